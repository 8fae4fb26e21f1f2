"""What the Shampoo family gains over AdamW, in steps to a target; prints a table in Markdown.

    python benchmarks/optimizer_gain.py --out records/2026-11-21-optimizers

Problems: a diagonal quadratic, where AdamW's own assumption holds; least squares with two rotated ill-conditioned
factors, where a Kronecker product is exact; and the workload `digits`. Everybody has the budget of the problem and a
learning rate that falls linearly to 0 at its end. The rate is tuned on one grid for all, which is extended for all
while anybody's best lies at an edge; then come fresh seeds, and ratios of steps are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stretto.measure.statistics import Outcome, speed_up
from stretto.optim import SOAP, KLShampoo, Muon, NorMuon, OneSidedShampoo, Shampoo, SOAPMuon
from stretto.workloads.digits import Digits

Named = list[tuple[str, Tensor]]
Make = Callable[[Named, float], Optimizer]


def adamw(params: Named, lr: float) -> Optimizer:
    return torch.optim.AdamW([p for _, p in params], lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)


def eigen(params: Named, lr: float) -> Optimizer:
    return Shampoo(params, lr, direction="eigen")


MEMBERS: dict[str, Make] = {  # each with its defaults, without weight decay
    "AdamW": adamw,
    "Shampoo": Shampoo,
    "Shampoo, eigen": eigen,
    "OneSidedShampoo": OneSidedShampoo,
    "KLShampoo": KLShampoo,
    "SOAP": SOAP,
    "SOAPMuon": SOAPMuon,
    "Muon": Muon,
    "NorMuon": NorMuon,
}
BASE = "AdamW"


class Task(ABC):
    """One seed of a problem: parameters, a noisy gradient of each step, and the loss that counts."""

    params: Named

    @abstractmethod
    def differentiate(self) -> None:
        """The next step's gradient, into the parameters."""

    @abstractmethod
    def loss(self) -> float:
        """What is compared with the target."""


@dataclass(frozen=True)
class Problem:
    """What is solved: a task for each seed, a budget and the loss that has to be reached within it."""

    name: str
    task: Callable[[int], Task]
    budget: int
    target: float
    evaluate_every: int
    grid: tuple[float, ...]  # learning rates to begin with


class DiagonalQuadratic(Task):
    """0.5 sum of h w², h log-uniform over four decades, as a share of what it begins at.

    The noise of an entry has the variance h, times a constant, as that of minibatches has near an optimum.
    """

    def __init__(self, seed: int, shape: tuple[int, int] = (32, 48), noise: float = 0.1) -> None:
        self.random, self.noise = torch.Generator().manual_seed(seed), noise
        self.curvature = 10 ** (-4 * torch.rand(shape, generator=self.random))
        self.weight = torch.randn(shape, generator=self.random).requires_grad_()
        self.params, self.first = [("weight", self.weight)], 1.0
        self.first = self.loss()

    def differentiate(self) -> None:
        noise = self.noise * torch.randn(self.weight.shape, generator=self.random)
        self.weight.grad = self.curvature * self.weight.detach() + self.curvature.sqrt() * noise

    def loss(self) -> float:
        return 0.5 * (self.curvature * self.weight.detach() ** 2).sum().item() / self.first


class LeastSquares(Task):
    """0.5 |a W B - y|², mean over rows a of A; less its minimum, as a share of what it begins at.

    A (rows, m) and B (n, n) have singular values from 1 to 1/condition and random singular vectors.
    """

    def __init__(
        self, seed: int, shape: tuple[int, int] = (32, 48), condition: float = 1e3,
        rows: int = 512, batch: int = 64, noise: float = 1e-3,
    ) -> None:  # fmt: skip
        (m, n), self.batch = shape, batch
        self.random = torch.Generator().manual_seed(seed)
        left = self._orthogonal(rows, m)
        self.a = rows**0.5 * self._conditioned(left, m, condition)
        self.b = self._conditioned(self._orthogonal(n, n), n, condition)
        y = self.a @ self._normal(m, n) @ self.b + noise * self._normal(rows, n)
        self.y, self.weight = y, torch.zeros(shape, requires_grad=True)
        self.floor = (y - left @ (left.T @ y)).square().sum().item() / (2 * rows)
        self.params, self.first = [("weight", self.weight)], 1.0
        self.first = self.loss()
        self.order = torch.empty(0, dtype=torch.int64)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def _orthogonal(self, rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(self._normal(rows, columns))[0]

    def _conditioned(self, left: Tensor, n: int, condition: float) -> Tensor:
        return left * condition ** -torch.linspace(0, 1, n) @ self._orthogonal(n, n).T

    def differentiate(self) -> None:
        if not len(self.order):
            self.order = torch.randperm(len(self.a), generator=self.random)
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        a, w = self.a[chosen], self.weight.detach()
        self.weight.grad = a.T @ ((a @ w @ self.b - self.y[chosen]) @ self.b.T) / len(a)

    def loss(self) -> float:
        rest = self.a @ self.weight.detach() @ self.b - self.y
        return (rest.square().sum().item() / (2 * len(rest)) - self.floor) / self.first


class DigitsTask(Task):
    """The workload `digits`: model, batches, loss and validation are its own."""

    workload: Digits | None = None

    def __init__(self, seed: int) -> None:
        if DigitsTask.workload is None:
            DigitsTask.workload = Digits()
        self.digits, self.random = DigitsTask.workload, torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = self.digits.model()
        self.params = list(self.model.named_parameters())
        self.data, self.order = self.digits.data("train"), torch.empty(0, dtype=torch.int64)

    def differentiate(self) -> None:
        if len(self.order) < self.digits.batch:
            self.order = torch.randperm(len(self.data), generator=self.random)
        chosen, self.order = self.order[: self.digits.batch], self.order[self.digits.batch :]
        inputs, targets = self.data.take(chosen)
        self.model.zero_grad()
        self.digits.loss(self.model(inputs), targets).mean().backward()

    def loss(self) -> float:
        self.model.eval()
        with torch.no_grad():
            found = self.digits.evaluate(self.model)["loss"]
        self.model.train()
        return found


GRID = (0.003, 0.01, 0.03, 0.1)
PROBLEMS = {
    "diagonal": Problem("diagonal quadratic", DiagonalQuadratic, 400, 1e-3, 5, GRID),
    "least-squares": Problem("least squares", LeastSquares, 600, 1e-3, 5, GRID),
    "digits": Problem("digits", DigitsTask, 200, 0.07, 5, GRID),
}
QUICK = {
    "diagonal": replace(PROBLEMS["diagonal"], budget=20),
    "least-squares": replace(PROBLEMS["least-squares"], budget=20),
}


@dataclass(frozen=True)
class Run:
    """One run: steps to the target, or those of the budget where it was missed."""

    problem: str
    member: str
    purpose: str
    lr: float
    seed: int
    steps: int
    reached: bool
    loss: float  # the last one that was measured; a run ends when it has reached the target

    @property
    def rank(self) -> tuple[float, float]:
        """Sooner is better, and among those that missed, nearer."""
        return (self.steps if self.reached else math.inf, self.loss)


def run(problem: Problem, member: str, lr: float, seed: int, purpose: str) -> Run:
    """Train to the first evaluation that meets the target and is followed by one that does, or to the budget's end."""
    task = problem.task(seed)
    optimizer = MEMBERS[member](task.params, lr)
    loss, crossed = math.inf, None
    for step in range(1, problem.budget + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - (step - 1) / problem.budget)
        task.differentiate()
        optimizer.step()
        if step % problem.evaluate_every and step < problem.budget:
            continue
        loss = task.loss()
        if not math.isfinite(loss):
            loss, crossed = math.inf, None
            break
        if loss > problem.target:
            crossed = None
        elif crossed is not None:
            break
        else:
            crossed = step
    steps = problem.budget if crossed is None else crossed
    return Run(problem.name, member, purpose, lr, seed, steps, crossed is not None, loss)


def tune(problem: Problem, members: Iterable[str], seeds: Sequence[int]) -> tuple[dict[str, float], list[Run]]:
    """The best learning rate of each member, and all trials: as many for each."""
    runs: list[Run] = []
    grid: list[float] = []
    new = list(problem.grid)
    best: dict[str, float] = {}
    while new:
        runs += [
            run(problem, member, lr, seed, "tuning") for member in members for lr in new for seed in seeds
        ]
        grid = sorted([*grid, *new])
        for member in members:
            ranks = {
                lr: tuple(map(statistics.mean, zip(*(r.rank for r in runs if r.member == member and r.lr == lr))))
                for lr in grid
            }
            best[member] = min(grid, key=lambda lr: ranks[lr])
        new = [lr / 3 for lr in grid[:1] if lr in best.values()] + [lr * 3 for lr in grid[-1:] if lr in best.values()]
        new = [float(f"{lr:.1g}") for lr in new]
    return best, runs
