"""What runs will take, from a few of their steps and one evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from stretto.train import Trainer

PROBE_STEPS = 7  # timed steps, spread over a run
FOOTPRINT = 5 / 3600  # hours, about, to start a process and measure an arm's footprint there

Key = TypeVar("Key")


def training(trainers: Mapping[Key, Trainer]) -> dict[Key, float]:
    """Hours of a whole run of each, from a few steps taken in turns; what is paid at the first step is past.

    ValueError where one cannot take them, since its losses or gradients are not finite.
    """
    taken: dict[Key, list[float]] = {one: [] for one in trainers}
    for k in range(PROBE_STEPS):
        for one, trainer in trainers.items():
            trainer.seek(trainer.plan.steps * k // PROBE_STEPS)
            start = time.perf_counter()
            try:
                trainer.advance(1)
            except FloatingPointError as error:
                raise ValueError(f"a recipe fails in its first steps: {error}") from error
            taken[one].append(time.perf_counter() - start)
    return {one: median(taken[one]) * trainer.plan.steps / 3600 for one, trainer in trainers.items()}


def evaluating(trainer: Trainer) -> float:
    """Hours of the evaluations of one run, which are on no clock."""
    start = time.perf_counter()
    trainer.evaluate()
    return (time.perf_counter() - start) / trainer.workload.eval_every / 3600


def told(hours: float, arms: int) -> str:
    """What all of it takes: the runs of so many hours, and the footprints of so many arms."""
    return f"at most {in_words(hours)}, and about {in_words(FOOTPRINT * arms)} for memory and operations of a step"


def in_words(hours: float) -> str:
    """A duration in the largest unit of which it holds one: 2.5 h, 12.0 min, 0.4 s."""
    sizes = (hours, "h"), (60 * hours, "min"), (3600 * hours, "s")
    size, unit = next((one for one in sizes if one[0] >= 1), sizes[-1])
    return f"{size:.1f} {unit}"
