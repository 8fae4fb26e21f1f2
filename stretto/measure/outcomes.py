"""What a run comes to: the first crossing of the target that persists, and the time it took or did not suffice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = dict[str, Any]  # an evaluation: its step, seconds, and metrics


class Interval(NamedTuple):
    """An estimate and its confidence limits, all in the unit of the data."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """One run's time to the target, in any unit; if not `reached`, the time trained without reaching it.

    With `before`, the crossing lies in (before, time], between two evaluations; else it is exactly at `time`.
    """

    seed: int
    time: float
    reached: bool = True
    before: float | None = None

    def __post_init__(self) -> None:
        if not (self.time > 0 and math.isfinite(self.time)):
            raise ValueError(f"a run's time must be positive and finite, not {self.time} (seed {self.seed})")
        if self.before is not None and not (self.reached and 0 < self.before < self.time):
            raise ValueError(
                f"a crossing lies after `before`, above 0, and up to {self.time}, not after {self.before}; "
                f"leave it out for a miss or a crossing at the first evaluation (seed {self.seed})"
            )


class Crossing(NamedTuple):
    """Between which steps a run reached the target, and whether a second evaluation confirmed it."""

    before: int
    at: int
    confirmed: bool


def find_crossing(
    rows: Sequence[Row], metric: str, target: float, falls: bool, steps: int
) -> Crossing | None:
    """The first crossing of the target that holds at the next evaluation; the last evaluation of a budget
    confirms itself. An unconfirmed one at the end of `rows` is returned as such.
    """
    before, found = 0, None
    for row in rows:
        value = row[metric]
        if value is not None and (value <= target if falls else value >= target):
            if found:
                return Crossing(found.before, found.at, True)
            found = Crossing(before, row["step"], row["step"] >= steps)
        else:
            found = None
        before = row["step"]
    return found


def smoothed(rows: Sequence[Row], metric: str, window: int) -> list[Row]:
    """The rows with the median of the last `window` values in place of the metric; none while one is missing.

    A median, because one lucky evaluation moves a mean across the target, and one bad one away from it. A
    crossing is then found (window − 1) / 2 evaluations late, in every arm alike.
    """
    if window < 1:
        raise ValueError(f"a window holds at least 1 evaluation, not {window}")
    values = [row[metric] for row in rows]
    seen = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [
        {**row, metric: None if len(last) < window or None in last else statistics.median(last)}
        for row, last in zip(rows, seen)
    ]


def outcome(rows: Sequence[Row], crossing: Crossing | None, seed: int, unit: str = "wall") -> Outcome:
    """A run's outcome in a unit of its rows; without a confirmed crossing, a miss at its last evaluation."""
    if crossing is None or not crossing.confirmed:
        return Outcome(seed, rows[-1][unit], reached=False)
    taken = {row["step"]: row[unit] for row in rows}
    return Outcome(seed, taken[crossing.at], before=taken.get(crossing.before))
