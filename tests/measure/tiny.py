"""A workload that trains in milliseconds: a line through noisy points, by a small MLP."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stretto.core import Forward, Recipe
from stretto.data import Arrays
from stretto.methods import SGD, AdamW, WarmupStableDecay
from stretto.recipes import Arm
from stretto.workloads import Workload


class Tiny(Workload):
    name = "tiny"
    batch = 8
    budget = 8 * 40
    metric = "loss"
    targets = {"baseline": 0.13, "never": -1.0}
    measured_on = "tiny-data"

    @property
    def fingerprint(self) -> str:
        return "tiny-data"

    def data(self, split: Literal["train", "valid"]) -> Arrays:
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        inputs = torch.randn(64, 4, generator=generator)
        return Arrays(inputs, inputs.sum(1, keepdim=True).tanh())

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets, reduction="none").mean(1)

    def evaluate(self, predict: Forward) -> dict[str, float]:
        data: Any = self.data("valid")
        return {"loss": float(F.mse_loss(predict(data.inputs), data.targets))}


ADAMW = Arm("adamw", Recipe(AdamW(lr=0.02), WarmupStableDecay()))
SLOW = Arm("slow", Recipe(SGD(lr=1e-5)))
BROKEN = Arm("broken", Recipe(SGD(lr=1e30, momentum=0.0, nesterov=False)))
