"""The plan: from a recipe and a budget to steps, batch sizes and data order, known before the run begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from stretto.core import At, Recipe, ScheduleMethod, stable_hash

CALIBRATION_BATCHES = 32


class Plan:
    """Steps, batch sizes and data order of one run; iterating yields `At` from the present step on.

    examples: size of the data set. batch: examples a step, over all slices. One of epochs, steps, samples
    and tokens is the budget; the run takes whole batches and never more than the budget, but at least one.
    Data order is a function of (seed, epoch): every example once an epoch, batches may straddle two epochs.
    Raises ValueError for a budget that is missing or given twice, and for a batch its slices cannot share.
    """

    def __init__(
        self,
        recipe: Recipe,
        examples: int,
        batch: int,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        samples: int | None = None,
        tokens: float | None = None,
        seed: int = 0,
        tokens_per_example: int | None = None,
        slices: int | None = None,
    ) -> None:
        budgets = {"epochs": epochs, "steps": steps, "samples": samples, "tokens": tokens}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"a plan has one budget: epochs, steps, samples or tokens; given: {given or 'none'}")
        [(unit, value)] = given.items()
        if value <= 0:
            raise ValueError(f"the budget is {value} {unit}; it must be above 0")
        if examples <= 0 or batch <= 0:
            raise ValueError(f"examples ({examples}) and batch ({batch}) must be above 0")
        self.recipe, self.examples, self.batch, self.seed = recipe, examples, batch, seed
        self.tokens_per_example, self.slices = tokens_per_example, slices or 1
        if batch % self.slices:
            raise ValueError(f"a batch of {batch} cannot be cut into {self.slices} equal slices")
        if unit == "tokens" and not tokens_per_example:
            raise ValueError("a budget in tokens needs tokens_per_example")
        if unit == "steps":
            self.sizes = self._fit(int(value))
        else:
            per_unit = {"epochs": examples, "samples": 1, "tokens": 1 / (tokens_per_example or 1)}[unit]
            self.sizes = self._walk(max(1, int(value * per_unit)))
        self.ends = list(accumulate(self.sizes))  # examples done after each step
        self.planned = self.ends[-1]
        self.step = 0
        self._orders: dict[int, Tensor] = {}

    def _walk(self, samples: int) -> list[int]:
        """Batch sizes of a run over this many examples, each a function of the fraction done alone."""
        paced = [m for m in self.recipe.of(ScheduleMethod) if "batch_size" in m.paces]
        if not paced:
            return [self.batch] * max(1, samples // self.batch)
        sizes: list[int] = []
        done = 0
        while True:
            at = At(0, 0, 0, done, samples, self.seed, examples=self.examples)
            factor = paced[0].schedule(at)["batch_size"]
            size = max(1, round(self.batch * factor / self.slices)) * self.slices
            if done + size > samples and sizes:
                return sizes
            sizes.append(size)
            done += size
            if done >= samples:
                return sizes

    def _fit(self, steps: int) -> list[int]:
        """Batch sizes of a run of exactly this many steps."""
        low, high = steps, steps * self.batch
        while len(self._walk(high)) < steps:
            low, high = high, 2 * high
        while low < high:  # the smallest budget with so many steps
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._walk(middle)) >= steps else (middle + 1, high)
        return self._walk(low)[:steps]

    @property
    def steps(self) -> int:
        """How many steps the whole run takes."""
        return len(self.sizes)

    def __len__(self) -> int:
        return self.steps - self.step

    def at(self, step: int) -> At:
        """Where training is just before this step; `at(plan.steps)` is the end."""
        done = self.ends[step - 1] if step else 0
        batch = self.sizes[step] if step < self.steps else 0
        return At(
            step, self.steps, done // self.examples, done, self.planned, self.seed, batch,
            self.examples, self.tokens_per_example, 0, self.slices,
        )  # fmt: skip

    def __iter__(self) -> Iterator[At]:
        while self.step < self.steps:
            yield self.at(self.step)
            self.step += 1

    def resume(self, step: int) -> None:
        """Go on before this step; loaders made by then start there."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"this plan has {self.steps} steps; it cannot resume at {step}")
        self.step = step

    def indices(self, at: At) -> Tensor:
        """The data set's ids of this step's global batch, (at.batch,) int64, in row order."""
        pieces, position, missing = [], at.done, at.batch
        while missing:
            epoch, offset = divmod(position, self.examples)
            piece = self._order(epoch)[offset : offset + missing]
            pieces.append(piece)
            position, missing = position + len(piece), missing - len(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            generator = torch.Generator().manual_seed(stable_hash(self.seed, "order", epoch))
            self._orders[epoch] = torch.randperm(self.examples, generator=generator)
        return self._orders[epoch]

    def batches(self) -> Sampler[list[int]]:
        """A batch sampler for a DataLoader: ids of each batch, from the plan's present step."""
        return _Batches(self)

    def calibration(self, dataset: Any, batches: int = CALIBRATION_BATCHES) -> DataLoader[Any]:
        """A loader of its own over the batches that precede or follow the present step; loads when iterated."""
        first = max(0, min(self.step, self.steps - batches))
        return DataLoader(dataset, batch_sampler=_Batches(self, first, min(self.steps, first + batches)))


class _Batches(Sampler[list[int]]):
    def __init__(self, plan: Plan, first: int | None = None, last: int | None = None) -> None:
        self.plan, self.first, self.last = plan, first, plan.steps if last is None else last

    def _start(self) -> int:
        return self.plan.step if self.first is None else self.first

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._start(), self.last):
            yield self.plan.indices(self.plan.at(step)).tolist()

    def __len__(self) -> int:
        return self.last - self._start()


def check_half_life(half_life_steps: float, steps: int) -> None:
    """Warn where an average remembers more than the whole run."""
    if half_life_steps > steps:
        warnings.warn(
            f"a half-life of {half_life_steps:.0f} steps is longer than the run of {steps}; "
            "the average will hardly leave its start",
            stacklevel=3,
        )


__all__ = ["CALIBRATION_BATCHES", "Plan", "Sequence"]
