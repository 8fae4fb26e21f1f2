"""Squared ReLU: relu(x)² between the layers of an MLP. Primer, So et al. 2021, arXiv:2109.08668."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from stretto.core import ModelMethod, Phase
from stretto.models.roles import nothing_found, replace_child, roles


class SquaredReLULayer(nn.Module):
    """relu(x)², element by element."""

    def forward(self, x: Tensor) -> Tensor:
        """Square what is positive."""
        return F.relu(x).square()


@dataclass(frozen=True)
class SquaredReLU(ModelMethod):
    """Replaces the activation of every MLP by relu(x)².

    No parameters, the same shapes, but pretrained weights do not fit it. Raises ValueError where there is no MLP.
    """

    phases = (Phase.ACTIVATION,)

    def model(self, model: nn.Module) -> nn.Module:
        """Swap the activations."""
        activations = roles(model).activations
        if not activations:
            raise nothing_found("SquaredReLU", "activations of MLPs", model)
        for owner, name in activations:
            replace_child(owner, name, SquaredReLULayer())
        return model
