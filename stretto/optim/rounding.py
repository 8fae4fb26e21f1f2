"""Adding float32 steps to weights of fewer bits, without losing the small ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stretto.optim.symmetric import Rate

ROUNDINGS = ("nearest", "stochastic", "compensated")


def round_stochastically(values: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the chances that keep the mean.

    bfloat16 is float32 without its last 16 bits: a random number is added to those before they are cut off.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def add_rounded(weight: Tensor, step: Tensor, rounding: str, rest: Tensor | None) -> None:
    """weight += step, in place; weight of any floating dtype, step of the same shape in float32.

    "nearest" rounds the sum; "stochastic" keeps its mean, and needs bfloat16; "compensated" keeps what rounding left
    off in `rest`, of the weight's dtype, and adds it next time (Kahan's sum).
    """
    if rounding == "compensated":
        assert rest is not None
        total = weight.float() + (step + rest.float())
        weight.copy_(total)
        rest.copy_(total - weight.float())
    elif rounding == "stochastic":
        weight.copy_(round_stochastically(weight.float() + step))
    else:
        weight.copy_(weight.float() + step)


def add_steps(
    weights: list[Tensor],
    steps: list[Tensor],
    keep: Rate | list[Tensor],
    rounding: str,
    rests: Sequence[Tensor | None],
) -> None:
    """weights = keep * weights + steps, in place; steps in float32 or better, of the weights' shapes.

    keep: one number, or one for each weight.
    """
    if not weights:
        return
    if weights[0].dtype == steps[0].dtype:
        if not isinstance(keep, float | int) or keep != 1:
            torch._foreach_mul_(weights, keep)
        torch._foreach_add_(weights, steps)
        return
    for i, (weight, step, rest) in enumerate(zip(weights, steps, rests)):
        kept = keep[i] if isinstance(keep, list) else keep
        add_rounded(weight, step.float() + (kept - 1) * weight.float(), rounding, rest)
