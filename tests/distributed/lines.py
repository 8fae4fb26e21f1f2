"""A workload that trains in milliseconds, in float64; as a program, `stretto` with that workload.

No number of ranks divides the sides of its MLP, and one is shorter than the ranks are many.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
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

# For those who want to end a run under way, however slow the machine is. LINGER and DEATH: at a first start alone.
PASSES = itertools.count(1)  # one a step where a rank has one slice
PAUSE = float(os.environ.get("PAUSE", "0"))  # seconds in each pass
FIRST = os.environ if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" else {}
LINGER = float(FIRST.get("LINGER", "inf"))  # the pass from which each takes a second more
DEATH = FIRST.get("DEATH")  # "rank pass seconds": that rank kills itself so long after that pass
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
        number = next(PASSES)
        if DEATH:
            die(number, *map(float, DEATH.split()))
        time.sleep(PAUSE + (number >= LINGER))
        return F.mse_loss(outputs, targets, reduction="none").mean(1)

    def evaluate(self, predict: Forward) -> dict[str, float]:
        data: Any = self.data("valid")
        return {"loss": float(F.mse_loss(predict(data.inputs), data.targets))}


class WideLines(Lines):
    hidden = 8


def die(number: int, rank: float, when: float, seconds: float) -> None:
    """Of a rank, by -9, so many seconds after a pass."""
    if (number, int(os.environ["RANK"])) == (when, rank):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


if __name__ == "__main__":
    workloads.WORKLOADS["lines"] = Lines
    recipes.WORKLOADS["lines"] = SimpleNamespace(RACES={"baseline": {"baseline": (RECIPE,)}})
    if folder := os.environ.get("PIDS"):
        Path(folder, f"{os.getpid()}.{os.environ.get('RANK', 'alone')}").touch()
    cli.main()
