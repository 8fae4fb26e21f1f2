"""What may be said of a speed-up: an estimate, an interval, one of three verdicts, and the seeds it takes.

Everything is done on log time, where ratios are differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Interval(NamedTuple):
    """A mean and its confidence limits, all in the unit of the data."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """One run's time to the target, in any unit; if not `reached`, the time trained without reaching it."""

    seed: int
    time: float
    reached: bool = True

    def __post_init__(self) -> None:
        if not (self.time > 0 and math.isfinite(self.time)):
            raise ValueError(f"a run's time must be positive and finite, not {self.time} (seed {self.seed})")


@dataclass(frozen=True)
class SpeedUp:
    """How many times sooner an arm reaches the target than its base, with a confidence interval.

    method: "paired" or "welch" intervals, two-sided; "bound", one-sided, where runs missed the target;
    "too few" where no interval can be drawn, which is then (0, inf).
    """

    estimate: float | None  # none where runs missed the target
    low: float
    high: float
    verdict: Literal["faster", "slower", "not resolved"]
    method: Literal["paired", "welch", "bound", "too few"]
    confidence: float = 0.95
    spread: float | None = None  # standard deviation of one run's log time, less what pairing cancels

    def __str__(self) -> str:
        return f"{self.figures} {self.verdict}".strip()

    @property
    def figures(self) -> str:
        """The numbers without the verdict; empty where there are none."""
        if self.method == "bound":
            bounded = self.low > 0 or math.isfinite(self.high)
            sign, limit = (">", self.low) if self.low > 0 else ("<", self.high)
            return f"{sign} {figure(limit)}x (one-sided)" if bounded else ""
        if self.estimate is None:
            return ""
        if self.method == "too few":
            return f"{figure(self.estimate)}x (too few seeds for an interval)"
        return f"{figure(self.estimate)}x [{figure(self.low)}, {figure(self.high)}]"


def speed_up(
    base: Sequence[Outcome],
    other: Sequence[Outcome],
    confidence: float = 0.95,
    paired: bool | Literal["auto"] = "auto",
) -> SpeedUp:
    """Time of `base` over time of `other`: exp(mean log T_base − mean log T_other), above 1 is faster.

    Paired by seed where both arms have the same seeds ("auto"), else Welch. A miss makes its arm's times
    lower limits: then there is no estimate, and a bound on one side only. ValueError for an arm without runs.
    """
    if not base or not other:
        raise ValueError("a speed-up needs at least one run of each arm")
    base, other = (sorted(arm, key=lambda outcome: outcome.seed) for arm in (base, other))
    seeds, other_seeds = [outcome.seed for outcome in base], [outcome.seed for outcome in other]
    if paired == "auto":
        paired = seeds == other_seeds and len(set(seeds)) == len(seeds)
    elif paired and seeds != other_seeds:
        raise ValueError(f"pairing wants the same seeds in both arms, not {seeds} and {other_seeds}")
    missed = [not all(outcome.reached for outcome in arm) for arm in (base, other)]
    first, second = ([math.log(outcome.time) for outcome in arm] for arm in (base, other))
    estimate = None if any(missed) else math.exp(mean(first) - mean(second))
    if all(missed):
        return SpeedUp(None, 0.0, math.inf, "not resolved", "bound", confidence)
    if min(len(first), len(second)) < 2:
        return SpeedUp(estimate, 0.0, math.inf, "not resolved", "too few", confidence)
    level = 2 * confidence - 1 if any(missed) else confidence  # whose one end is the one-sided limit
    if paired:
        interval = paired_interval(first, second, level)
        spread = deviation([a - b for a, b in zip(first, second)]) / math.sqrt(2)
    else:
        interval = welch_interval(first, second, level)
        spread = math.sqrt((deviation(first) ** 2 + deviation(second) ** 2) / 2)
    low = 0.0 if missed[1] else math.exp(interval.low)
    high = math.inf if missed[0] else math.exp(interval.high)
    verdict: Literal["faster", "slower", "not resolved"]
    verdict = "faster" if low > 1 else "slower" if high < 1 else "not resolved"
    method: Literal["bound", "paired", "welch"] = "bound" if any(missed) else "paired" if paired else "welch"
    return SpeedUp(estimate, low, high, verdict, method, confidence, None if any(missed) else spread)


def paired_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of first − second, (n,) each, n ≥ 2."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    error = deviation(differences) / math.sqrt(len(differences))
    return _interval(mean(differences), error, len(differences) - 1, confidence)


def welch_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Welch's interval of mean(first) − mean(second), (n,) and (m,), both ≥ 2; variances may be 0."""
    shares = [deviation(sample) ** 2 / len(sample) for sample in (first, second)]
    degrees = 1.0
    if sum(shares) > 0:
        parts = zip(shares, (len(first), len(second)))
        degrees = 1 / sum((share / sum(shares)) ** 2 / (size - 1) for share, size in parts)
    return _interval(mean(first) - mean(second), math.sqrt(sum(shares)), degrees, confidence)


def seeds_needed(
    effect: float, sd: float, power: float = 0.8, confidence: float = 0.95, least: int = 3
) -> int:
    """Seeds in each of two arms to resolve a speed-up of 1 + effect; `sd` is that of one run's log time.

    From the noncentral t: the normal formula promises .80 and delivers .62 to .78 for few seeds.
    """
    from scipy.special import nctdtr, stdtrit

    if not effect > 0 or not sd >= 0:
        raise ValueError(f"power wants an effect above 0 and an sd of at least 0, not {effect} and {sd}")
    difference, seeds = math.log1p(effect), max(least, 2)
    while sd > 0:
        degrees, shift = 2 * seeds - 2, difference / (sd * math.sqrt(2 / seeds))
        if 1 - nctdtr(degrees, shift, stdtrit(degrees, (1 + confidence) / 2)) >= power:
            break
        seeds += max(1, seeds // 1000)  # to 0.1 % where thousands are needed
    return seeds


class Parts(NamedTuple):
    """A speed-up as the product of two: fewer steps, and cheaper steps (above 1 is better in both)."""

    step_efficiency: float
    step_cost: float


def decompose(
    base_steps: Sequence[float],
    base_cost: Sequence[float],
    other_steps: Sequence[float],
    other_cost: Sequence[float],
) -> Parts:
    """Split a speed-up into ratios, base over other, of steps to the target and of cost a step, each (n,)."""
    return Parts(
        geometric_mean(base_steps) / geometric_mean(other_steps),
        geometric_mean(base_cost) / geometric_mean(other_cost),
    )


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean log): the mean of ratios and of times. ValueError for none, or one that is not positive."""
    if not values or min(values) <= 0:
        raise ValueError(f"a geometric mean wants positive values, not {list(values)}")
    return math.exp(mean([math.log(value) for value in values]))


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation, n − 1 in the denominator, n ≥ 2."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def figure(ratio: float) -> str:
    """A ratio with the digits that a reader needs: 0.034, 0.96, 1.07, 6.3, 12.7, 240."""
    if ratio < 0.1:
        return f"{ratio:.2g}"
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def _interval(centre: float, error: float, degrees: float, confidence: float) -> Interval:
    from scipy.special import stdtrit

    reach = error * float(stdtrit(degrees, (1 + confidence) / 2)) if error > 0 else 0.0
    return Interval(centre, centre - reach, centre + reach)
