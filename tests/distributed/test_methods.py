"""Every method that can be used with our GPT: two ranks equal one process that acts as two slices."""

from __future__ import annotations

import pytest
import ranks
import torch
from test_slices import Case, alone, assert_same, curve, ddp, fsdp
from torch import nn

from stretto import methods
from stretto.models.gpt import GPT

RECIPES = [
    "adamw, gradient_clipping:norm=0.1", "adamw, gradient_value_clipping:limit=0.01", "adamw, ema", "adamw, swa",
    "adamw, sam:rho=0.05:every=2", "adamw, sam:rho=0.5:every=2:adaptive=true", "adamw, lookahead:every=2",
    "adamw, schedule_free", "adamw, primal_averaging", "adamw, ema_nesterov", "adamw, cautious_weight_decay",
    "adamw, adaptive_gradient_clipping", "adamw, selective_backprop:start=0.2:scale=1", "adamw, z_loss",
    "adamw, sequence_length_warmup", "adamw, rotary_positions, qk_norm, squared_relu, residual_scalars",
    "adamw, value_embeddings, token_smearing, sliding_window", "adamw, zero_init_residual", "adamw, alibi",
    "adamw, type_rates:embedding=0.5", "muon, hyperball", "muon, update_floor",
    "adamw, label_smoothing, logit_soft_cap", "sgd", "lion", "muon", "shampoo", "soap",
    "adamw, cosine, gated_linear_units", "adamw, linear_to_zero, short_convolution", "adamw, ngram_embeddings",
    "adamw, power_cool, random_token_dropping", "adamw, low_precision_norm", "adamw, float8:emulate=true",
    "adamw, batch_size_warmup", "adamw, stochastic_depth", "adamw, progressive_layer_drop",
]  # fmt: skip


def deep() -> nn.Module:
    """As many blocks as dropping tokens between the first and the last wants."""
    torch.manual_seed(0)
    return GPT(13, length=8, width=16, depth=3, heads=2).double()


def curves(texts: list[str], wrap, slices: int | None = None) -> list:
    """Of each recipe, or what it raised."""
    found = []
    for text in texts:
        try:
            net = {"net": deep} if "token_dropping" in text else {}
            found.append(curve(Case(methods.parse(text), steps=8, **net), wrap, slices))
        except Exception as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_two_ranks_equal_two_slices(wrap):
    expected = curves(RECIPES, alone, 2)
    found = ranks.run(curves, 2, RECIPES, wrap, seconds=200)
    wrong = {}
    for number, text in enumerate(RECIPES):
        for theirs in found:
            try:
                assert not isinstance(expected[number], str), expected[number]
                assert not isinstance(theirs[number], str), theirs[number]
                assert_same(theirs[number], expected[number])
            except AssertionError as error:
                wrong[text] = str(error)
    assert not wrong, "\n".join(f"{text}: {why}" for text, why in wrong.items())
