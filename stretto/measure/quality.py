"""Equal quality where schedules end at their budget: which budget the baseline needs for the same quality.

Each budget is a training of its own, fully decayed. Mean quality over log budget is made monotone (isotonic) and
joined by a monotone cubic (PCHIP): no shape is assumed, and the line between budgets twice apart would be off by
some 3 % of the budget. Nothing is said beyond the budgets that were trained. Also the frontier of cost and quality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from stretto.measure.outcomes import Interval
from stretto.measure.statistics import SpeedUp, mean, welch_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FEWEST = 4  # budgets that a curve is drawn through
POINTS = 501  # of a curve, evenly spaced in log budget
DRAWS = 4000


class Trained(NamedTuple):
    """One fully decayed run: its budget, in examples or steps, and its quality at the end."""

    seed: int
    budget: float
    quality: float


@dataclass(frozen=True)
class Equal:
    """A quality, the budgets that reach it, and the speed-up: their ratio times that of the costs."""

    quality: float
    budget: float  # the contestant's
    needed: Interval  # the baseline's; infinite or 0 where a limit lies beyond the budgets that were trained
    speed_up: SpeedUp


class Curve(NamedTuple):
    """A monotone fit, all (POINTS,): log budgets, qualities (rising), variances, and the latters' degrees."""

    budgets: Floats
    qualities: Floats
    variances: Floats
    degrees: Floats


class Place(NamedTuple):
    """An arm's mean cost and quality, whether no other arm beats both, and how probably that is so."""

    cost: float
    quality: float
    on_frontier: bool
    probability: float


def equal_quality(
    base: Sequence[Trained],
    other: Sequence[Trained],
    *,
    falls: bool,
    base_cost: Sequence[float] = (1.0, 1.0),
    other_cost: Sequence[float] = (1.0, 1.0),
    confidence: float = 0.95,
) -> list[Equal]:
    """For each budget of `other`: what budget gives `base` the same mean quality, and how many times dearer.

    The costs are of a unit of budget, (n,) and (m,) measurements, both ≥ 2. The interval holds the noise of
    both arms' seeds, which are taken as independent, and of the costs; a nominal 95 % covered 94 to 98 % of
    4,000 draws with 2 to 10 seeds. Where a quality lies beyond those of `base`, the speed-up is a bound, wrong
    in at most (1 − confidence) / 2. ValueError for fewer than 4 budgets of `base`, or 2 seeds at one.
    """
    curve, cost = fit(base, falls), _log_cost(base_cost, other_cost, confidence)
    found = []
    for budget, (quality, variance, seeds) in _summary(other).items():
        needed = _solve(curve, -quality if falls else quality, variance / seeds, seeds - 1, confidence)
        own = math.log(budget)
        ratio = _sum([Interval(*(end - own for end in needed)), cost])
        budgets = Interval(*(math.exp(end) for end in needed))
        found.append(Equal(quality, budget, budgets, _speed_up(ratio, confidence)))
    return found


def speed_up_curve(
    base: Sequence[Trained],
    other: Sequence[Trained],
    *,
    falls: bool,
    base_cost: Sequence[float] = (1.0, 1.0),
    other_cost: Sequence[float] = (1.0, 1.0),
    confidence: float = 0.95,
    points: int = 33,
) -> list[Equal]:
    """The speed-up at qualities evenly spaced over those that both arms' curves reach; as `equal_quality`.

    `other` too needs 4 budgets. Empty where the arms have no quality in common.
    """
    curves, cost = (fit(base, falls), fit(other, falls)), _log_cost(base_cost, other_cost, confidence)
    low, high = (max(c.qualities[0] for c in curves), min(c.qualities[-1] for c in curves))
    found = []
    for quality in np.linspace(low, high, points) if low < high else ():
        needed, own = (_solve(curve, float(quality), 0.0, 1, confidence) for curve in curves)
        ratio = _sum([needed, Interval(-own.estimate, -own.high, -own.low), cost])
        budgets = Interval(*(math.exp(end) for end in needed))
        value = float(-quality if falls else quality)
        found.append(Equal(value, math.exp(own.estimate), budgets, _speed_up(ratio, confidence)))
    return found


def fit(runs: Sequence[Trained], falls: bool) -> Curve:
    """The monotone curve of quality (its negative where it falls) on log budget, with its standard errors.

    The variance at a point is that of the budgets' means, by the curve's own slopes in them.
    """
    cells = _summary(runs)
    if len(cells) < FEWEST:
        raise ValueError(f"a curve wants {FEWEST} budgets or more, not {len(cells)}; train at others between")
    means, variances, seeds = (np.array(column) for column in zip(*cells.values()))
    means = -means if falls else means
    knots = np.log(np.array(list(cells)))
    grid = np.linspace(knots[0], knots[-1], POINTS)
    step = 1e-6 * (np.ptp(means) or 1.0)
    moved = means[:, None] + step * np.eye(len(means))
    curves = _monotone(knots, np.column_stack([means, moved]), seeds, grid)
    slopes = (curves[:, 1:] - curves[:, :1]) / step
    parts = slopes**2 * variances / seeds  # (POINTS, budgets)
    return Curve(grid, np.maximum.accumulate(curves[:, 0]), parts.sum(1), _degrees(parts, seeds - 1))


def _monotone(knots: Floats, means: Floats, weights: Floats, grid: Floats) -> Floats:
    """Rising curves (POINTS, n) through columns of means (budgets, n) that need not rise."""
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import isotonic_regression

    rising = [isotonic_regression(column, weights=weights).x for column in means.T]
    return np.asarray(PchipInterpolator(knots, np.column_stack(rising))(grid))


def _summary(runs: Sequence[Trained]) -> dict[float, tuple[float, float, int]]:
    """Mean, variance and number of seeds at each budget, the smallest first."""
    cells: dict[float, list[float]] = {}
    for run in sorted(runs, key=lambda run: run.budget):
        if not (math.isfinite(run.quality) and run.budget > 0):
            raise ValueError(
                f"seed {run.seed} at budget {run.budget:g} ended at {run.quality}: no quality to compare"
            )
        cells.setdefault(run.budget, []).append(run.quality)
    if alone := [f"{budget:g}" for budget, values in cells.items() if len(values) < 2]:
        raise ValueError(f"an interval needs 2 seeds or more at each budget; {', '.join(alone)} has 1")
    return {b: (mean(values), float(np.var(values, ddof=1)), len(values)) for b, values in cells.items()}


def _degrees(parts: Floats, degrees: Floats) -> Floats:
    """Satterthwaite's degrees of freedom of sums (n,) of parts (n, k), each with its own degrees (k,)."""
    squares = np.sum(parts**2 / degrees, axis=1)
    return np.where(squares > 0, parts.sum(1) ** 2 / np.where(squares > 0, squares, 1.0), 1.0)


def _solve(curve: Curve, quality: float, variance: float, degrees: int, confidence: float) -> Interval:
    """The log budget at which the curve has a quality; infinite where that lies beyond its budgets.

    The limits hold every budget at which curve and quality do not differ by a t test (Fieller's way), so
    where the curve is flat the interval is as wide as it must be, and one-sided at the ends.
    """
    from scipy.special import stdtrit

    x, y = curve.budgets, curve.qualities
    parts = np.column_stack([curve.variances, np.full(len(x), variance)])
    each = np.column_stack([curve.degrees, np.full(len(x), degrees)])
    reach = stdtrit(_degrees(parts, each), (1 + confidence) / 2) * np.sqrt(parts.sum(1))
    low, high = _first(y + reach - quality, x), -_first((quality + reach - y)[::-1], -x[::-1])
    if quality > y[-1]:
        return Interval(math.inf, low, math.inf)
    if quality < y[0]:
        return Interval(-math.inf, -math.inf, high)
    return Interval(float(np.interp(quality, y, x)), low, high)


def _first(margin: Floats, at: Floats) -> float:
    """Where it reaches 0, between points too: -inf if from the start, as it may before, the end if nowhere."""
    i = int(np.argmax(margin >= 0))
    if margin[i] < 0:
        return float(at[-1])
    if i == 0:
        return -math.inf
    return float(np.interp(0, margin[i - 1 : i + 1], at[i - 1 : i + 1]))


def _log_cost(base: Sequence[float], other: Sequence[float], confidence: float) -> Interval:
    """log of the ratio of costs, base over other."""
    if min(len(base), len(other)) < 2 or min(*base, *other) <= 0:
        raise ValueError(
            f"costs want 2 positive measurements of each arm, not {list(base)} and {list(other)}"
        )
    first, second = ([math.log(cost) for cost in costs] for costs in (base, other))
    return Interval(*welch_interval(first, second, confidence))


def _sum(parts: Sequence[Interval]) -> Interval:
    """The interval of a sum of independent estimates from theirs; Zou & Donner 2008, Statistics in Medicine."""
    estimate = math.fsum(part.estimate for part in parts)
    if math.isinf(estimate):
        return Interval(estimate, sum(part.low for part in parts), sum(part.high for part in parts))
    below = math.hypot(*(part.estimate - part.low for part in parts))
    above = math.hypot(*(part.high - part.estimate for part in parts))
    return Interval(estimate, estimate - below, estimate + above)


def _speed_up(log_ratio: Interval, confidence: float) -> SpeedUp:
    bounded = math.isinf(log_ratio.estimate)
    low, high = math.exp(log_ratio.low), math.exp(log_ratio.high)
    verdict: Literal["faster", "slower", "not resolved"]
    verdict = "faster" if low > 1 else "slower" if high < 1 else "not resolved"
    estimate = None if bounded else math.exp(log_ratio.estimate)
    return SpeedUp(estimate, low, high, verdict, "bound" if bounded else "welch", confidence)


def frontier(costs: Floats, qualities: Floats, falls: bool) -> NDArray[np.bool_]:
    """Which of the arms (..., A) no other matches or beats in both cost and quality, and beats in one."""
    cost, quality = costs[..., None], (-qualities if falls else qualities)[..., None]
    cost_of_rival, quality_of_rival = np.swapaxes(cost, -1, -2), np.swapaxes(quality, -1, -2)
    matched = (cost_of_rival <= cost) & (quality_of_rival >= quality)
    beaten = (cost_of_rival < cost) | (quality_of_rival > quality)
    return np.asarray(~np.any(matched & beaten, axis=-1))


def on_frontier(
    arms: Mapping[str, Sequence[tuple[float, float]]], *, falls: bool, draws: int = DRAWS, seed: int = 0
) -> dict[str, Place]:
    """Each arm's place by its means over seeds of (cost, quality), geometric in cost; the probability is the
    share of draws of seeds with replacement. ValueError for an arm with fewer than 2 seeds.
    """
    if alone := [name for name, runs in arms.items() if len(runs) < 2]:
        raise ValueError(f"the probability needs 2 seeds or more of each arm; {', '.join(alone)} has fewer")
    generator = np.random.default_rng(seed)
    means, drawn = [], []
    for runs in arms.values():
        values = np.array([(math.log(cost), quality) for cost, quality in runs])  # (seeds, 2)
        centre, chosen = values.mean(0), generator.integers(len(runs), size=(draws, len(runs)))
        widen = math.sqrt(len(runs) / (len(runs) - 1))  # draws from n vary by n − 1 over n too little
        means.append(centre)
        drawn.append(centre + widen * (values[chosen].mean(1) - centre))
    costs, qualities = np.array(means).T
    on = frontier(costs, qualities, falls)
    drawn_costs, drawn_qualities = np.stack(drawn, axis=-1).swapaxes(0, 1)  # (draws, A) each
    share = frontier(drawn_costs, drawn_qualities, falls).mean(0)
    return {
        name: Place(math.exp(costs[i]), float(qualities[i]), bool(on[i]), float(share[i]))
        for i, name in enumerate(arms)
    }
