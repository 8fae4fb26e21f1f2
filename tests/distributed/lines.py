"""A workload that trains in milliseconds, in float64; as a program, `stretto` with that workload.

No number of ranks divides the sides of its MLP, and one is shorter than the ranks are many.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stretto import cli, recipes, workloads
from stretto.core import Forward, Recipe
from stretto.data import Arrays
from stretto.methods import EMA, AdamW, WarmupStableDecay
from stretto.workloads import Workload

PAUSE = float(os.environ.get("PAUSE", "0"))  # seconds in each step, for those who want to kill it there
RECIPE = Recipe(AdamW(lr=0.02), WarmupStableDecay(), EMA(half_life=0.1))


class Lines(Workload):
    name = "lines"
    batch = 16
    budget = 16 * 20
    metric = "loss"
    targets = {"baseline": 0.1}
    measured_on = "lines"
    hidden = 7

    @property
    def fingerprint(self) -> str:
        return "lines"

    def data(self, split: Literal["train", "valid"]) -> Arrays:
        inputs = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(len(split)))
        return Arrays(inputs, inputs.cumsum(1)[:, :3].tanh())

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 3)).double()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(PAUSE)
        return F.mse_loss(outputs, targets, reduction="none").mean(1)

    def evaluate(self, predict: Forward) -> dict[str, float]:
        data: Any = self.data("valid")
        return {"loss": float(F.mse_loss(predict(data.inputs), data.targets))}


class WideLines(Lines):
    hidden = 8


if __name__ == "__main__":
    workloads.WORKLOADS["lines"] = Lines
    recipes.WORKLOADS["lines"] = SimpleNamespace(RACES={"baseline": {"baseline": (RECIPE,)}})
    if folder := os.environ.get("PIDS"):
        Path(folder, f"{os.getpid()}.{os.environ.get('RANK', 'alone')}").touch()
    cli.main()
