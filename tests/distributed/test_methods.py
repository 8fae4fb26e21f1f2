"""Every method that can be used with our GPT: two ranks equal one process that acts as two slices."""

from __future__ import annotations

import pytest
import ranks
from test_slices import Case, alone, assert_same, curve, ddp, fsdp

from stretto import methods

RECIPES = [
    "adamw, gradient_clipping:norm=0.1", "adamw, gradient_value_clipping:limit=0.01", "adamw, ema", "adamw, swa",
    "adamw, sam:rho=0.05:every=2", "adamw, sam:rho=0.5:every=2:adaptive=true", "adamw, lookahead:every=2",
    "adamw, schedule_free", "adamw, primal_averaging", "adamw, ema_nesterov", "adamw, cautious_weight_decay",
    "adamw, adaptive_gradient_clipping", "adamw, selective_backprop:start=0.2:scale=1", "adamw, z_loss",
    "adamw, sequence_length_warmup", "adamw, rotary_positions, qk_norm, squared_relu, residual_scalars",
    "adamw, value_embeddings, token_smearing, sliding_window", "adamw, zero_init_residual", "adamw, alibi",
    "adamw, type_rates:embedding=0.5", "muon, hyperball", "muon, update_floor",
    "adamw, label_smoothing, logit_soft_cap", "sgd", "lion", "muon", "shampoo", "soap",
]  # fmt: skip


def curves(texts: list[str], wrap, slices: int | None = None) -> list:
    """Of each recipe, or what it raised."""
    found = []
    for text in texts:
        try:
            found.append(curve(Case(methods.parse(f"{text}"), steps=8), wrap, slices))
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
