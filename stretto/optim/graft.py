"""Grafting: the length of one rule's step with the direction of another. Agarwal et al. 2020, arXiv:2002.11803."""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.optim.symmetric import Rate

GRAFTS = ("sgd", "adagrad", "rmsprop", "adam")


def track(square: Tensor, gradient: Tensor, weight: Rate, spare: Tensor, *, summed: bool) -> None:
    """The average of squares, or their sum for AdaGrad, in place; spare is overwritten, all (B, ...)."""
    torch.mul(gradient, gradient, out=spare)
    if summed:
        square.add_(spare.mul_(weight) if isinstance(weight, Tensor) else spare)
    else:
        square.lerp_(spare, weight)


def divided(x: Tensor, square: Tensor, eps: Rate, out: Tensor) -> Tensor:
    """x / (sqrt(square) + eps), into out, which is not x."""
    torch.sqrt(square, out=out)
    return torch.div(x, out.add_(eps), out=out)


def lengths(stack: Tensor) -> Tensor:
    """Frobenius norm of each block: (B, d1 .. dr) -> (B, 1 .. 1)."""
    return torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.ndim)), keepdim=True)
