"""Stacks of symmetric matrices, large ones kept by halves: three quarters of the products and of the memory.

A matrix of n rows above `WHOLE` is kept as its first n // 2 rows and columns, (h, h), and its other rows, (n - h, n);
smaller ones whole, since small products gain nothing by halving.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

Rate = float | Tensor  # one for the whole stack, or (B,) or (1,)

WHOLE = 512


class Symmetric(NamedTuple):
    """A stack (B, n, n): all of it, or top (B, h, h) and rest (B, n - h, n)."""

    top: Tensor
    rest: Tensor | None = None

    def add_gram(self, x: Tensor, transposed: Tensor, decay: Rate, weight: Rate) -> None:
        """self <- decay self + weight x xᵀ, in place: x (B, n, m), transposed (B, m, n).

        n² m FLOPs times 2, or 1.5 for halves.
        """
        if isinstance(decay, Tensor) or isinstance(weight, Tensor):
            for part in self.parts():
                part.mul_(over(decay, part))
            x = x * over(weight, x)
            decay = weight = 1.0
        if self.rest is None:
            _add_product(self.top, x, transposed, decay, weight)
            return
        half = self.top.shape[1]
        upper, lower = x.split((half, self.rest.shape[1]), dim=1)
        _add_product(self.top, upper, transposed[:, :, :half], decay, weight)
        _add_product(self.rest, lower, transposed, decay, weight)

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        """The matrices times x (B, n, m), into out, which is not x; 2 n² m FLOPs."""
        if self.rest is None:
            return torch.bmm(self.top, x, out=out)
        sizes = half, _ = self.top.shape[1], self.rest.shape[1]
        upper, lower = x.split(sizes, dim=1)
        if x.dtype == torch.bfloat16:  # whose products into parts of a tensor are 500 times slower on a CPU
            top = torch.bmm(self.top, upper) + torch.bmm(self.rest[:, :, :half].mT, lower)
            return out.copy_(torch.cat([top, torch.bmm(self.rest, x)], dim=1))
        out_upper, out_lower = out.split(sizes, dim=1)
        torch.bmm(self.top, upper, out=out_upper)
        out_upper.baddbmm_(self.rest[:, :, :half].mT, lower)
        torch.bmm(self.rest, x, out=out_lower)
        return out

    def parts(self) -> list[Tensor]:
        """What is kept."""
        return [self.top] if self.rest is None else [self.top, self.rest]

    def diagonals(self) -> list[tuple[Tensor, int]]:
        """The parts, each with the offset at which the matrices' diagonal lies in it."""
        return [(part, offset) for part, offset in zip(self.parts(), (0, self.top.shape[1]))]

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Some of the matrices, whole: (K, n, n), a copy."""
        if self.rest is None:
            return self.top[index].to(dtype)
        half, n = self.top.shape[1], self.rest.shape[2]
        matrices = torch.empty(len(index), n, n, dtype=dtype, device=self.top.device)
        matrices[:, :half, :half] = self.top[index]
        matrices[:, half:] = self.rest[index]
        matrices[:, :half, half:] = matrices[:, half:, :half].mT
        return matrices


def halved(matrices: Tensor) -> list[Tensor]:
    """(B, n, n) -> the parts that are kept of it."""
    n = matrices.shape[-1]
    if n <= WHOLE:
        return [matrices]
    half = n // 2
    return [matrices[:, :half, :half].contiguous(), matrices[:, half:].contiguous()]


def gram_halves(x: Tensor) -> list[Tensor]:
    """x xᵀ, the parts that are kept of it: (K, n, m) -> (K, n, n) or halves, without the products of the other."""
    n = x.shape[1]
    if n <= WHOLE:
        return [torch.bmm(x, x.mT)]
    upper, lower = x.split((n // 2, n - n // 2), dim=1)
    return [torch.bmm(upper, upper.mT), torch.bmm(lower, x.mT)]


@overload
def over(rate: Tensor, like: Tensor) -> Tensor: ...
@overload
def over(rate: Rate, like: Tensor) -> Rate: ...
def over(rate: Rate, like: Tensor) -> Rate:
    """A rate of each matrix, shaped to multiply the stack `like` (B, ...)."""
    return rate.view(-1, *[1] * (like.ndim - 1)) if isinstance(rate, Tensor) else rate


def _add_product(out: Tensor, a: Tensor, b: Tensor, decay: float, weight: float) -> None:
    if a.dtype == out.dtype:
        out.baddbmm_(a, b, beta=decay, alpha=weight)
    else:
        out.mul_(decay).add_(torch.bmm(a, b), alpha=weight)
