"""Gradient clipping by the global norm. Pascanu et al. 2013, arXiv:1211.5063."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stretto import shards
from stretto.core import At, GradientsMethod, Phase, State


def clip_by_norm(gradients: Sequence[Tensor], norm: float) -> Tensor:
    """Scale all gradients in place by one factor, so that their joint norm is at most `norm`.

    Gives the norm they had, over all ranks, 0-d, float32 or better; nothing syncs with the host.
    """
    total = shards.norm(gradients)
    torch._foreach_mul_([shards.local(g) for g in gradients], (norm / (total + 1e-6)).clamp(max=1.0))
    return total


@dataclass(frozen=True)
class GradientClipping(GradientsMethod):
    """Bounds the joint norm of all gradients.

    Cost: one reading of the gradients, and one writing.
    Evidence: buys stability, not speed: it saves runs from rare large gradients, of recurrent nets (Pascanu et
    al.), language models and large learning rates above all.
    Raises ValueError for a norm that is not above 0.
    """

    norm: float = 1.0  # the largest joint norm that is left as it is
    phases = (Phase.CLIP,)

    def __post_init__(self) -> None:
        if self.norm <= 0:
            raise ValueError(f"GradientClipping: norm is {self.norm}; it must be above 0")

    def gradients(self, model: nn.Module, at: At, state: State) -> None:
        """Clip what has a gradient."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients:
            clip_by_norm(gradients, self.norm)
