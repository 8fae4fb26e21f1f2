"""Stacks of symmetric matrices, kept as the lower half: three quarters of the products and of the memory.

A matrix of n rows above `WHOLE` is kept as its first n // 2 rows and columns (h, h) and its other rows (n - h, n), one
after the other in a flat row of the stack; smaller ones as they are, since small products gain nothing by halving.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rate = float | Tensor  # one for the stack, or (B,) or (1,)

WHOLE = 512


def over(rate: Rate, like: Tensor) -> Rate:
    """A rate of each matrix, shaped to multiply the stack `like` (B, ...)."""
    return rate.view(-1, *[1] * (like.ndim - 1)) if isinstance(rate, Tensor) else rate


def packed(n: int) -> int:
    """Entries kept of one matrix."""
    half = n // 2
    return n * n if n <= WHOLE else half * half + (n - half) * n


def halves(stack: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """Views of a packed stack (B, packed(n)): all of it (B, n, n), or top (B, h, h) and bottom (B, n - h, n)."""
    if n <= WHOLE:
        return stack.unflatten(1, (n, n)), None
    half = n // 2
    return stack[:, : half * half].unflatten(1, (half, half)), stack[:, half * half :].unflatten(
        1, (n - half, n)
    )


def unpack(stack: Tensor, n: int) -> Tensor:
    """The matrices (B, n, n); above the diagonal of halved ones is what is below it."""
    top, bottom = halves(stack, n)
    if bottom is None:
        return top
    full = stack.new_empty(len(stack), n, n)
    half = n // 2
    full[:, :half, :half], full[:, half:] = top, bottom
    full[:, :half, half:] = bottom[:, :, :half].mT
    return full


def pack(matrices: Tensor) -> Tensor:
    """(B, n, n) -> (B, packed(n)), from the lower half."""
    n = matrices.shape[-1]
    if n <= WHOLE:
        return matrices.flatten(1)
    half = n // 2
    return torch.cat([matrices[:, :half, :half].flatten(1), matrices[:, half:].flatten(1)], dim=1)


def accumulate(stack: Tensor, x: Tensor, decay: Rate, weight: Rate) -> None:
    """stack <- decay stack + weight x xᵀ, in place: packed (B, packed(n)) in float32 or better, x (B, n, m).

    n² m FLOPs times 2, or 1.5 for halved ones.
    """
    n = x.shape[1]
    if isinstance(decay, Tensor) or isinstance(weight, Tensor):
        stack.mul_(over(decay, stack))
        x = x * over(weight**0.5, x)
        decay = weight = 1.0
    top, bottom = halves(stack, n)
    upper = x if bottom is None else x[:, : n // 2]
    _add_product(top, upper, upper.mT, decay, weight)
    if bottom is not None:
        _add_product(bottom, x[:, n // 2 :], x.mT, decay, weight)


def multiply(stack: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """The symmetric matrices times x (B, n, m), into out, which is not x; 2 n² m FLOPs."""
    n = x.shape[1]
    top, bottom = halves(stack, n)
    if bottom is None:
        return torch.bmm(top, x, out=out)
    half = n // 2
    upper, lower = x.split((half, n - half), dim=1)
    out_upper, out_lower = out.split((half, n - half), dim=1)
    torch.bmm(top, upper, out=out_upper)
    out_upper.baddbmm_(bottom[:, :, :half].mT, lower)
    torch.bmm(bottom, x, out=out_lower)
    return out


def _add_product(out: Tensor, a: Tensor, b: Tensor, decay: float, weight: float) -> None:
    if a.dtype == out.dtype:
        out.baddbmm_(a, b, beta=decay, alpha=weight)
    else:
        out.mul_(decay).add_(torch.bmm(a, b), alpha=weight)
