"""Update floor: no matrix steps by less than a share of its size. Krishna 2026, modded-nanogpt, pull request 274."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from stretto.optim.hyperball import TINY, norms
from stretto.optim.wrapper import Stepping, Wrapper, shards


def lengthen(params: list[Tensor], before: list[Tensor], share: float) -> None:
    """Scale each step from before to params up to the norm share * ||before||_F, where it is below.

    before holds this rank's shards. A step of 0 stays 0. In place on both.
    """
    weights = shards(params)
    floors = share * norms(before, params)
    steps = torch._foreach_sub(weights, before)
    factors = (floors / norms(steps, params).clamp(min=TINY)).clamp(min=1.0)
    torch._foreach_mul_(steps, list(factors.unbind()))
    torch._foreach_add_(before, steps)
    torch._foreach_copy_(weights, before)


class UpdateFloor(Wrapper):
    """Steps lr u of weights W of two or more dimensions have ||u||_F >= update_floor * ||W||_F.

    The floor keeps updates in proportion to weights that have grown, which weight decay does otherwise. The
    decay of the optimizer inside counts as part of its step; CautiousWeightDecay around this one stays apart.
    `update_floor` is in each group, and 0 leaves a group as it is; 0.35 was found with Muon of scale "original"
    at a peak lr of 0.0375, and for steps of another size it is lr * update_floor that carries over. Memory: two
    copies of the matrices within the step. Raises ValueError where no weight has two dimensions.
    """

    def __init__(self, optimizer: Optimizer, update_floor: float = 0.35) -> None:
        if not update_floor > 0:
            raise ValueError(f"update_floor is {update_floor}; it must lie above 0, or leave UpdateFloor out")
        if not any(p.ndim > 1 for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"UpdateFloor looks for weights of two or more dimensions and found none in "
                f"{type(optimizer).__name__}; give it the model's matrices, or leave UpdateFloor out"
            )
        super().__init__(optimizer, update_floor=update_floor)

    @contextmanager
    def around(self, stepping: Stepping) -> Iterator[None]:
        """Note where each matrix is, then lengthen its step."""
        floored = []
        for group, params in stepping:
            matrices = [p for p in params if p.ndim > 1]
            if matrices and group["update_floor"]:
                floored.append((group, matrices, list(torch._foreach_clone(shards(matrices)))))
        yield
        for group, matrices, before in floored:
            lengthen(matrices, before, float(group["lr"]) * group["update_floor"])
