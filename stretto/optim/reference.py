"""Every rule for one tensor, without tricks: what the fast optimizers are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.optim.roots import QUINTIC


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """x <- a x + b (x xᵀ) x + c (x xᵀ)² x, from x of unit Frobenius norm: (m, n) -> (m, n)."""
    a, b, c = QUINTIC
    x = matrix / matrix.norm().clamp(min=1e-20)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def muon(
    parameter: Tensor,
    gradient: Tensor,
    average: Tensor,
    lr: float,
    momentum: float = 0.95,
    iterations: int = 5,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step of Muon: the new parameter (out, ...) and the new average of its gradients, zero at first."""
    average = momentum * average + (1 - momentum) * gradient
    ahead = momentum * average + (1 - momentum) * gradient
    factor = orthogonalize(ahead.reshape(len(ahead), -1), iterations)
    size = 0.2 * max(factor.shape) ** 0.5
    return (1 - lr * weight_decay) * parameter - lr * size * factor.reshape(parameter.shape), average


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step number `step`, from 1, of AdamW: parameter, average, average square; both begin at zero."""
    average = betas[0] * average + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    unbiased, spread = average / (1 - betas[0] ** step), torch.sqrt(square / (1 - betas[1] ** step))
    return (1 - lr * weight_decay) * parameter - lr * unbiased / (spread + eps), average, square
