"""What the trainer adds to a hand-written loop: a tiny MLP, CPU milliseconds a step; the last line is the figure.

    python benchmarks/overhead.py

Both loops take the same steps on the same data in alternating blocks; the figure is the median over blocks of
the difference. A second table shows what importing stretto adds to importing torch.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from stretto.core import Forward, Recipe
from stretto.data import Arrays
from stretto.methods import AdamW
from stretto.train import Trainer
from stretto.workloads import Workload

BLOCKS, STEPS, BATCH, EXAMPLES = 60, 200, 32, 4096


class TinyMLP(Workload):
    """Two layers on random numbers: little enough to see the loop around it."""

    name = "tiny-mlp"
    batch = BATCH
    budget = BATCH * STEPS * (BLOCKS + 1)
    metric = "loss"
    targets = {"none": 0.0}
    measured_on = "random"

    @property
    def fingerprint(self) -> str:
        return "random"

    def data(self, split: Literal["train", "valid"]) -> Arrays:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(EXAMPLES, 16, generator=generator)
        return Arrays(inputs, torch.randint(0, 10, (EXAMPLES,), generator=generator))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))

    loss = staticmethod(F.cross_entropy)

    def evaluate(self, predict: Forward) -> dict[str, float]:
        return {}


class ByHand:
    """The loop that anybody writes: the same data, model and optimizer (vectors do not decay)."""

    def __init__(self, workload: TinyMLP) -> None:
        self.data, self.model = workload.data("train"), workload.model()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), fused=True)
        self.order = torch.randperm(EXAMPLES)
        self.step = 0

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            begin = self.step * BATCH % EXAMPLES
            inputs, targets = self.data.take(self.order[begin : begin + BATCH])
            loss = F.cross_entropy(self.model(inputs), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1


def cpu(advance: Any) -> float:
    """CPU milliseconds a step."""
    begin = time.process_time()
    advance(STEPS)
    return (time.process_time() - begin) / STEPS * 1e3


def seconds_to_import(module: str) -> float:
    """Median wall seconds of `import module` in fresh processes."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def main() -> None:
    torch.set_num_threads(1)
    workload = TinyMLP()
    hand, trainer = ByHand(workload), Trainer(workload, Recipe(AdamW()))
    hand.advance(STEPS), trainer.advance(STEPS)
    pairs = [(cpu(hand.advance), cpu(trainer.advance)) for _ in range(BLOCKS)]
    torch_alone, with_stretto = (
        seconds_to_import("torch"),
        seconds_to_import("torch, stretto.update, stretto.methods"),
    )
    print(
        f"import torch: {torch_alone:.2f} s; import torch, stretto.update, stretto.methods: {with_stretto:.2f} s"
    )
    print(f"by hand: {statistics.median(a for a, _ in pairs):.3f} ms a step")
    print(f"trainer: {statistics.median(b for _, b in pairs):.3f} ms a step")
    print(f"added: {statistics.median(b - a for a, b in pairs):.3f} ms a step")


if __name__ == "__main__":
    main()
