"""What may be said of a speed-up: an estimate, an interval, one of three verdicts.

Everything is done on log time, where ratios are differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from stretto.measure.outcomes import Interval, Outcome
from stretto.measure.survival import compare

Verdict = Literal["faster", "slower", "not resolved"]


@dataclass(frozen=True)
class SpeedUp:
    """How many times sooner an arm reaches the target than its base, with a confidence interval.

    method: "paired" or "welch" Student's intervals; "aft", an accelerated failure time model, where runs missed the
    target; "bound", one end of its interval, where no run of an arm reached it; "too few" where no interval can be
    drawn, which is then (0, inf).
    """

    estimate: float | None  # none where an arm has no hit
    low: float
    high: float
    verdict: Verdict
    method: Literal["paired", "welch", "aft", "bound", "too few"]
    confidence: float = 0.95
    spread: float | None = None  # standard deviation of one run's log time, less what pairing cancels
    p_value: float | None = None  # of no difference

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

    Paired by seed where both arms have the same seeds ("auto"), else Welch. Where runs missed, they count as longer
    than their time, in a log-normal model without pairs. ValueError for an arm without runs.
    """
    if not base or not other:
        raise ValueError("a speed-up needs at least one run of each arm")
    base, other = (sorted(arm, key=lambda outcome: outcome.seed) for arm in (base, other))
    seeds, other_seeds = [outcome.seed for outcome in base], [outcome.seed for outcome in other]
    if paired == "auto":
        paired = seeds == other_seeds and len(set(seeds)) == len(seeds)
    elif paired and seeds != other_seeds:
        raise ValueError(f"pairing wants the same seeds in both arms, not {seeds} and {other_seeds}")
    if not all(outcome.reached for outcome in (*base, *other)):
        return _with_misses(base, other, confidence)
    first, second = ([math.log(outcome.time) for outcome in arm] for arm in (base, other))
    estimate = math.exp(mean(first) - mean(second))
    if min(len(first), len(second)) < 2:
        return SpeedUp(estimate, 0.0, math.inf, "not resolved", "too few", confidence)
    if paired:
        found, spread = (
            _paired(first, second),
            deviation([a - b for a, b in zip(first, second)]) / math.sqrt(2),
        )
    else:
        found, spread = _welch(first, second), math.hypot(deviation(first), deviation(second)) / math.sqrt(2)
    _, low, high = (_exp(limit) for limit in found.interval(confidence))
    method: Literal["paired", "welch"] = "paired" if paired else "welch"
    return SpeedUp(estimate, low, high, _verdict(low, high), method, confidence, spread, found.p_value)


def _with_misses(base: Sequence[Outcome], other: Sequence[Outcome], confidence: float) -> SpeedUp:
    hits = [any(outcome.reached for outcome in arm) for arm in (base, other)]
    if not any(hits):
        return SpeedUp(None, 0.0, math.inf, "not resolved", "bound", confidence)
    if min(len(base), len(other)) < 2:
        return SpeedUp(None, 0.0, math.inf, "not resolved", "too few", confidence)
    interval, spread, p_value = compare(base, other, confidence)
    estimate, low, high = (_exp(value) for value in interval)
    verdict = _verdict(low, high)
    if not all(hits):
        return SpeedUp(None, low, high, verdict, "bound", confidence, spread, p_value)
    return SpeedUp(estimate, low, high, verdict, "aft", confidence, spread, p_value)


def _verdict(low: float, high: float) -> Verdict:
    return "faster" if low > 1 else "slower" if high < 1 else "not resolved"


def paired_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of first − second, (n,) each, n ≥ 2."""
    return _paired(first, second).interval(confidence)


def welch_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Welch's interval of mean(first) − mean(second), (n,) and (m,), both ≥ 2; variances may be 0."""
    return _welch(first, second).interval(confidence)


class _Student(NamedTuple):
    """An estimate with its standard error, on so many degrees of freedom."""

    centre: float
    error: float
    degrees: float

    def interval(self, confidence: float) -> Interval:
        from scipy.special import stdtrit

        reach = self.error * float(stdtrit(self.degrees, (1 + confidence) / 2)) if self.error > 0 else 0.0
        return Interval(self.centre, self.centre - reach, self.centre + reach)

    @property
    def p_value(self) -> float:
        from scipy.special import stdtr

        if self.error == 0:
            return float(self.centre == 0)
        return 2 * float(stdtr(self.degrees, -abs(self.centre) / self.error))


def _paired(first: Sequence[float], second: Sequence[float]) -> _Student:
    differences = [a - b for a, b in zip(first, second, strict=True)]
    error = deviation(differences) / math.sqrt(len(differences))
    return _Student(mean(differences), error, len(differences) - 1)


def _welch(first: Sequence[float], second: Sequence[float]) -> _Student:
    shares = [deviation(sample) ** 2 / len(sample) for sample in (first, second)]
    degrees = 1.0
    if sum(shares) > 0:
        parts = zip(shares, (len(first), len(second)))
        degrees = 1 / sum((share / sum(shares)) ** 2 / (size - 1) for share, size in parts)
    return _Student(mean(first) - mean(second), math.sqrt(sum(shares)), degrees)


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


def _exp(value: float) -> float:
    if abs(value) > 709:  # it or its inverse does not fit a float
        return math.inf if value > 0 else 0.0
    return math.exp(value)
