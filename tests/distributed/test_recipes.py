"""The recipes of the demo: two ranks give the losses of one process that acts as two slices, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, nn

from stretto.core import Recipe
from stretto.methods import Muon, NGramEmbeddings, Shampoo
from stretto.models.gpt import GPT
from stretto.recipes.stdlib_gpt import MORE, RACES, fast
from stretto.train.parallel import Execution
from stretto.train.trainer import Trainer
from stretto.workloads import StdlibGPT

STEPS = 50
ARMS: dict[str, tuple[Recipe, int, int]] = {  # recipe, batch, budget in examples, as they are raced
    **RACES["baseline"],
    **MORE["baseline"],
    "fast with Shampoo": (fast() - Muon + Shampoo(lr=1e-2), 8, 88),
}


class Narrow(StdlibGPT):
    """The workload with a model a quarter as wide."""

    def model(self) -> nn.Module:
        return GPT(vocabulary=256, length=128, width=32, depth=4, heads=4)


def curve(arm: str, parallel: Any, steps: int) -> Tensor:
    """Losses of the first steps, then the loss on held-out files."""
    recipe, batch, budget = ARMS[arm]
    if NGramEmbeddings in recipe:
        recipe = recipe.replace(NGramEmbeddings, rows=2**10)
    trainer = Trainer(
        Narrow(), recipe, execution=Execution(parallel, "float64", device="cpu"),
        batch=batch, budget=max(budget, steps * batch), slices=2,
    )  # fmt: skip
    losses = []
    for _ in range(steps):
        trainer.advance()
        losses.append(trainer.loss)
    return torch.tensor([*losses, trainer.evaluate()["loss"]], dtype=torch.float64)


def curves(arms: list[str], parallels: list[str], steps: int) -> Tensor:
    """(arms, parallels, steps + 1)"""
    return torch.stack([torch.stack([curve(arm, parallel, steps) for parallel in parallels]) for arm in arms])


def assert_curves_agree(arms: list[str], steps: int) -> None:
    expected = curves(arms, ["none"], steps)
    assert (expected[:, 0, -1] < expected[:, 0, 0]).all()
    for found in ranks.run(curves, 2, arms, ["ddp", "fsdp"], steps, seconds=250):
        torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-8)


def test_arms_of_the_demo_begin_alike():
    """A recipe whose parts are right over ranks each alone, and not together."""
    assert_curves_agree(["fast", "fast with Shampoo"], 3)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_arms_of_the_demo_stay_alike(arm):
    """Differences that grow; Shampoo's refreshes, of which the first three steps see few."""
    assert_curves_agree([arm], STEPS)
