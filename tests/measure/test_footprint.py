"""What steps need, beside what it should be by hand."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from tiny import ADAMW, BROKEN, Tiny
from torch import Tensor, nn

from stretto.data import Arrays
from stretto.measure.footprint import UNKNOWN, count_flops, footprint
from stretto.measure.race import make_trainer

BATCH, HEADS, LENGTH, DEPTH = 8, 2, 5, 3


class Attending(nn.Module):
    """Attention among what its inputs are scaled by, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DEPTH))

    def forward(self, inputs: Tensor) -> Tensor:
        scaled = inputs * self.scale
        return F.scaled_dot_product_attention(scaled, scaled, scaled)


class Attention(Tiny):
    """Tiny with attention in place of layers."""

    def data(self, split: Literal["train", "valid"]) -> Arrays:
        inputs = torch.randn(64, HEADS, LENGTH, DEPTH, generator=torch.Generator().manual_seed(0))
        return Arrays(inputs, inputs)

    def model(self) -> nn.Module:
        return Attending()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean((1, 2, 3))


def test_operations_of_layers_are_those_by_hand() -> None:
    """4 × 16 and 16 × 1: two for each weight and example, again for their gradients and for the hidden layer's."""
    forward = 2 * BATCH * (4 * 16 + 16 * 1)
    assert count_flops(make_trainer(Tiny(), ADAMW, 0)) == 2 * forward + 2 * BATCH * 16 * 1


def test_attention_counts_on_every_device() -> None:
    """Two products forward; backward the scores again and four more."""
    product = 2 * BATCH * HEADS * LENGTH * LENGTH * DEPTH
    assert count_flops(make_trainer(Attention(), ADAMW, 0)) == 7 * product


def test_a_footprint_is_measured_in_a_process_of_its_own() -> None:
    found = footprint(Tiny, ADAMW)
    assert found.flops == count_flops(make_trainer(Tiny(), ADAMW, 0))
    assert found.memory is None or 0 < found.memory < 2e9


@pytest.mark.parametrize("wrong", [BROKEN])
def test_of_an_arm_that_cannot_train_nothing_is_known(wrong) -> None:
    assert footprint(Tiny, wrong) == UNKNOWN
