"""Orthogonal factors of stacks of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan 2024: singular values end in about [0.7, 1.2]


def orthogonalize(stack: Tensor, iterations: int = 5) -> Tensor:
    """Push all singular values towards 1 by a quintic Newton-Schulz iteration.

    stack (B, m, n) -> (B, m, n), in the dtype given; 2 * iterations * k² (2 l + k) FLOPs a matrix with
    k = min(m, n) and l = max(m, n). Zero matrices stay zero. Jordan et al. 2024 (Muon).
    """
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-20)[:, None, None]
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
