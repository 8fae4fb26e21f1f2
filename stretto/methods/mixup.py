"""MixUp: train on convex combinations of example pairs. Zhang et al. 2018, arXiv:1710.09412."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.core import At, Batch, BatchMethod, Mixed, Phase, map_data
from stretto.methods._draws import beta, partners


def mixup(inputs: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """Blend each example with its partner: share * own + (1 - share) * partner's.

    inputs (N, ...) floating, share (N,) in [0, 1], partner (N,) indices into the batch.
    """
    return torch.lerp(inputs[partner], inputs, share.to(inputs.dtype).view(-1, *(1,) * (inputs.ndim - 1)))


@dataclass(frozen=True)
class MixUp(BatchMethod):
    """Blends each example with another of its slice.

    Targets become Mixed, so any loss works.
    Cost: one gather and one pass over the inputs; the loss is evaluated twice.
    Evidence: keeps a net from fitting each example of images seen over many epochs (1.5x by
    Composer's card); it slows short runs: MosaicML's ResNet-50 recipes hold it from 135 epochs on,
    not at 36.
    Raises ValueError for inputs that are not floating, such as tokens, and for an alpha that is not above 0.
    """

    alpha: float = 0.2  # Beta(alpha, alpha) draws the blend; larger blends more
    phases = (Phase.MIX,)
    spaces = {"alpha": "log:0.05..1"}

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ValueError(f"MixUp: alpha is {self.alpha}; it must be above 0")

    def batch(self, batch: Batch, at: At) -> Batch:
        """Blend the inputs, and keep both targets."""
        assert batch.rows is not None
        share = beta(at.uniform("mixup", batch.rows)[:, 0], self.alpha, self.alpha)
        partner = partners(batch, at, "mixup")
        tensors = batch.inputs.values() if isinstance(batch.inputs, Mapping) else [batch.inputs]
        if not any(t.is_floating_point() for t in tensors):
            raise ValueError(
                f"MixUp blends numbers, and these inputs are {next(iter(tensors)).dtype}: "
                "scale images to floats before it; tokens cannot be blended"
            )
        inputs = map_data(lambda t: mixup(t, share, partner) if t.is_floating_point() else t, batch.inputs)
        mixed = Mixed(batch.targets, map_data(lambda t: t[partner], batch.targets), share)
        return Batch(inputs, mixed, batch.rows, batch.index)
