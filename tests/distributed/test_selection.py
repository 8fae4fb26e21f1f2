"""Selections that keep another number of examples on each rank: all ranks run as many passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import ranks
import torch.nn.functional as F
from test_slices import Case, alone, assert_same, curve, ddp, fsdp, pictures, resnet
from torch import Tensor

from stretto.core import At, Batch, Phase, Recipe, SelectMethod
from stretto.methods import AdamW


@dataclass(frozen=True)
class First(SelectMethod):
    """As many of the first examples of each slice, in every other step."""

    counts: tuple[int, ...]
    phases = (Phase.SELECT,)

    def select(self, batch: Batch, at: At, losses: Callable[[Batch], Tensor]) -> Batch:
        assert len(losses(batch)) == len(batch)
        return batch if at.step % 2 else batch.take(slice(0, self.counts[at.slice]))


TOKENS = Case(Recipe(AdamW(lr=1e-2), First((7, 2))), steps=6, microbatch=4)
IMAGES = Case(TOKENS.recipe, resnet, pictures, F.cross_entropy, steps=6, microbatch=4)


def curves(cases: list[Case], wrap, slices: int | None = None) -> list:
    return [curve(case, wrap, slices) for case in cases]


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_ranks_that_keep_few_take_as_many_passes(wrap):
    """A hang: one rank gathers weights for a third pass, and the other reduces gradients after its first."""
    cases = [TOKENS, IMAGES]
    expected = curves(cases, alone, 2)
    for found in ranks.run(curves, 2, cases, wrap):
        for mine, theirs in zip(found, expected):
            assert_same(mine, theirs)


@pytest.mark.parametrize(("counts", "microbatch"), [((7, 2), 3), ((5, 0), None)])
def test_a_rank_that_keeps_too_few_is_refused_by_all(counts, microbatch):
    """A rank that raises, and others that wait for it."""
    case = Case(Recipe(AdamW(), First(counts)), steps=6, microbatch=microbatch)
    with pytest.raises(ValueError, match=f"First kept {counts[1]} .* and {counts[0]} of another"):
        curve(case, alone, 2)
    for found in ranks.outcomes(curve, 2, case, fsdp):
        assert isinstance(found, ranks.Failed) and "select more evenly" in str(found)
