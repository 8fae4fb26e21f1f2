"""Cautious weight decay around any optimizer. Chen et al. 2025, arXiv:2510.12402."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from stretto.optim.wrapper import Stepping, Wrapper, shards


def decay_cautiously(params: list[Tensor], before: list[Tensor], rate: float) -> None:
    """Subtract rate * before from params where the step from before to params did not grow the weight.

    That is, where the update and the weight have one sign, or one of them is 0. In place on both.
    """
    allowed = torch._foreach_sub(before, params)
    torch._foreach_mul_(allowed, before)
    torch._foreach_sign_(allowed)
    torch._foreach_add_(allowed, 1.0)
    torch._foreach_clamp_max_(allowed, 1.0)
    torch._foreach_addcmul_(params, allowed, before, value=-rate)


class CautiousWeightDecay(Wrapper):
    """Decays by lr * weight_decay of the groups, where the update moves a weight towards 0 anyway.

    The optimizer inside steps without decay, so that of an optimizer with L2 decay becomes decoupled. Memory:
    two copies of the weights that decay, within the step. Raises ValueError where no group has weight decay.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not any(group.get("weight_decay") for group in optimizer.param_groups):
            raise ValueError(
                f"CautiousWeightDecay looks for groups with weight_decay above 0 and found none in "
                f"{type(optimizer).__name__}; give it weight decay, or leave CautiousWeightDecay out"
            )
        super().__init__(optimizer)

    @contextmanager
    def around(self, stepping: Stepping) -> Iterator[None]:
        """Step without decay, then decay what may."""
        decaying = [
            (group, shards(params), list(torch._foreach_clone(shards(params))), group["weight_decay"])
            for group, params in stepping
            if group.get("weight_decay")
        ]
        for group, *_ in decaying:
            group["weight_decay"] = 0.0
        try:
            yield
        finally:
            for group, _, _, decay in decaying:
                group["weight_decay"] = decay
        for group, params, before, decay in decaying:
            decay_cautiously(params, before, float(group["lr"]) * decay)
