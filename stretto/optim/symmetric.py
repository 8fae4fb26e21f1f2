"""Stacks of symmetric matrices, large ones kept by halves: three quarters of the products and of the memory.

A matrix of n rows above `WHOLE` is kept as its first n // 2 rows and columns, (h, h), and its other rows, (n - h, n);
smaller ones whole, since small products gain nothing by halving.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Rate = float | Tensor  # one for the whole stack, or (B,) or (1,)

WHOLE = 512


class Symmetric(NamedTuple):
    """A stack (B, n, n): all of it, or top (B, h, h) and rest (B, n - h, n)."""

    top: Tensor
    rest: Tensor | None = None

    def add_gram(self, x: Tensor, decay: Rate, weight: Rate) -> None:
        """self <- decay self + weight x xᵀ, in place, x (B, n, m); n² m FLOPs times 2, or 1.5 for halves."""
        if isinstance(decay, Tensor) or isinstance(weight, Tensor):
            for part in self.parts():
                part.mul_(over(decay, part))
            x = x * over(weight**0.5, x)
            decay = weight = 1.0
        if self.rest is None:
            _add_product(self.top, x, x.mT, decay, weight)
            return
        upper, lower = x.split((self.top.shape[1], self.rest.shape[1]), dim=1)
        _add_product(self.top, upper, upper.mT, decay, weight)
        _add_product(self.rest, lower, x.mT, decay, weight)

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        """The matrices times x (B, n, m), into out, which is not x; 2 n² m FLOPs."""
        if self.rest is None:
            return torch.bmm(self.top, x, out=out)
        sizes = half, _ = self.top.shape[1], self.rest.shape[1]
        upper, lower = x.split(sizes, dim=1)
        out_upper, out_lower = out.split(sizes, dim=1)
        torch.bmm(self.top, upper, out=out_upper)
        out_upper.baddbmm_(self.rest[:, :, :half].mT, lower)
        torch.bmm(self.rest, x, out=out_lower)
        return out

    def parts(self) -> list[Tensor]:
        """What is kept."""
        return [self.top] if self.rest is None else [self.top, self.rest]

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Some of the matrices, whole: (K, n, n), a copy."""
        top = self.top[index].to(dtype)
        if self.rest is None:
            return top
        rest, half = self.rest[index].to(dtype), top.shape[1]
        return torch.cat([torch.cat([top, rest[:, :, :half].mT], dim=2), rest], dim=1)


def halved(matrices: Tensor) -> list[Tensor]:
    """(B, n, n) -> the parts that are kept of it."""
    n = matrices.shape[-1]
    half = n // 2
    return (
        [matrices]
        if n <= WHOLE
        else [matrices[:, :half, :half].contiguous(), matrices[:, half:].contiguous()]
    )


def over(rate: Rate, like: Tensor) -> Rate:
    """A rate of each matrix, shaped to multiply the stack `like` (B, ...)."""
    return rate.view(-1, *[1] * (like.ndim - 1)) if isinstance(rate, Tensor) else rate


def _add_product(out: Tensor, a: Tensor, b: Tensor, decay: float, weight: float) -> None:
    if a.dtype == out.dtype:
        out.baddbmm_(a, b, beta=decay, alpha=weight)
    else:
        out.mul_(decay).add_(torch.bmm(a, b), alpha=weight)
