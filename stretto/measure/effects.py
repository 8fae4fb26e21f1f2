"""What each method does to log time, alone and together.

log T = μ + Σ β_i x_i + Σ γ_ij x_i x_j + block(seed), where x is 0 (absent) or 1 (present), so that β_i is method
i alone, β_i + Σ_j γ_ij is i in company of all others, and β_i + ½ Σ_j γ_ij is i on average. Effects are
differences of natural log time: below 0 is faster; γ above 0: the pair gives less than the product of its parts.
In ±1 columns the pair's coefficient would be γ / 4 and no coefficient would answer "alone".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from stretto.measure.designs import ANSWERS, Term, contrasts, expand, solvable, terms
from stretto.measure.outcomes import Interval, Outcome
from stretto.measure.statistics import SpeedUp, speed_up
from stretto.measure.survival import ITERATIONS, log_ends, log_likelihood


@dataclass(frozen=True, eq=False)
class Estimate:
    """Coefficients with what is known of them; blocks and constant are fitted beside them and left out.

    method: "residual", spread from runs that the model does not fit exactly; "lenth", from the smaller effects
    of an unreplicated design; "censored", from the likelihood with misses; "none": no spread, no intervals.
    """

    coefficients: np.ndarray  # (m,)
    information: np.ndarray  # (m, m), for a spread of 1; singular where something cannot be estimated
    spread: float  # standard deviation of one run's log time
    degrees: float
    method: Literal["residual", "lenth", "censored", "none"]
    unused: int = 0  # runs that bound nothing: misses of what was never seen to reach the target

    @cached_property
    def inverse(self) -> np.ndarray:
        """The covariance of what can be estimated, for a spread of 1."""
        return np.linalg.pinv(self.information, rcond=1e-10, hermitian=True)

    def contrast(self, weights: np.ndarray, confidence: float = 0.95) -> Interval | None:
        """The t interval of weights (m,) · coefficients; none where the runs do not determine it."""
        from scipy.special import stdtrit

        if np.abs(weights - weights @ self.inverse @ self.information).max() > 1e-8:
            return None
        centre = float(weights @ self.coefficients)
        if self.method == "none":
            return Interval(centre, -math.inf, math.inf)
        t = float(stdtrit(self.degrees, (1 + confidence) / 2))
        reach = t * float(self.spread) * math.sqrt(float(weights @ self.inverse @ weights))
        return Interval(centre, centre - reach, centre + reach)


@dataclass(frozen=True, eq=False)
class Fit:
    """The fitted surface of a study."""

    methods: tuple[str, ...]
    rows: np.ndarray  # (n, k) of 0 and 1, one a run
    outcomes: tuple[Outcome, ...]
    model: tuple[Term, ...]  # methods and pairs, without the constant
    estimate: Estimate
    confidence: float = 0.95

    @property
    def exact(self) -> bool:
        """Whether every run's time is known exactly."""
        return all(map(_exact, self.outcomes))


class Answers(NamedTuple):
    """One method's effect on log time, asked in three ways; none where the runs do not tell."""

    method: str
    alone: Interval | None
    in_company: Interval | None
    on_average: Interval | None
    measured_alone: SpeedUp | None  # from the runs of the baseline and of the method alone, no model
    measured_in_company: SpeedUp | None  # from the runs of all methods, and of all others


class Gap(NamedTuple):
    """Speed-up of all methods together over the product of what each gives alone: below 1, they overlap."""

    fitted: Interval | None
    measured: Interval | None  # from the baseline, the methods alone and all together


def fit(
    methods: Sequence[str],
    rows: np.ndarray,
    outcomes: Sequence[Outcome],
    pairs: bool = True,
    confidence: float = 0.95,
) -> Fit:
    """Fit the model to runs: rows (n, k) of 0 and 1, an outcome each. `pairs=False` assumes that none interacts.

    Least squares; where runs missed the target or crossed it between two evaluations, the log-normal
    likelihood of the same model. ValueError where no run reached the target.
    """
    rows = np.asarray(rows, dtype=int)
    model = tuple(term for term in terms(len(methods))[1:] if pairs or len(term) == 1)
    estimate = _estimate(expand(rows, model), outcomes)
    if estimate.method == "none" and (found := lenth_spread(rows, outcomes)):
        spread, degrees = found
        estimate = Estimate(estimate.coefficients, estimate.information, spread, degrees, "lenth")
    return Fit(tuple(methods), rows, tuple(outcomes), model, estimate, confidence)


def answers(found: Fit) -> list[Answers]:
    """Each method alone, in company and on average."""
    k, estimate = len(found.methods), found.estimate
    weights = {answer: rows[:, 1 : len(found.model) + 1] for answer, rows in contrasts(k).items()}
    told = []
    for i, method in enumerate(found.methods):
        alone, company, average = (estimate.contrast(weights[one][i], found.confidence) for one in ANSWERS)
        only = np.eye(k, dtype=int)[i]
        runs = _measured(found, 0 * only, only), _measured(found, 1 - only, 0 * only + 1)
        told.append(Answers(method, alone, company, average, *runs))
    return told


def interactions(found: Fit) -> dict[tuple[str, str], Interval | None]:
    """γ of each pair: above 0, the two give less than the product of their parts; none where not told."""
    unit = np.eye(len(found.model))
    return {
        (found.methods[term[0]], found.methods[term[1]]): found.estimate.contrast(row, found.confidence)
        for term, row in zip(found.model, unit)
        if len(term) == 2
    }


def composition_gap(found: Fit) -> Gap:
    """What is lost, or won, by composing all methods: exp(−Σ γ_ij), from the model and from the runs."""
    weights = np.array([-float(len(term) == 2) for term in found.model])
    fitted = found.estimate.contrast(weights, found.confidence)
    cells, place = np.unique(found.rows, axis=0, return_inverse=True)
    present, k = cells.sum(1), len(found.methods)
    of_cell = (1.0 - k) * (present == 0) + 1.0 * (present == 1) - 1.0 * (present == k)
    measured = None
    if k > 1 and present.min() == 0 and present.max() == k and of_cell.sum() == 0:
        by_cell = _estimate(np.eye(len(cells))[place.reshape(-1)], found.outcomes)
        measured = by_cell.contrast(of_cell, found.confidence)
    return Gap(*(interval and Interval(*np.exp(interval).tolist()) for interval in (fitted, measured)))


def lenth_spread(rows: np.ndarray, outcomes: Sequence[Outcome]) -> tuple[float, float] | None:
    """One run's spread and its degrees of freedom from an unreplicated orthogonal design, most of whose effects
    are nil: Lenth's pseudo standard error (1989). None for other designs, and where runs missed the target.
    """
    n, model = len(rows), terms(rows.shape[1])
    columns = np.unique([column * column[0] for column in expand(2 * rows - 1, model).T], axis=0)
    if not all(map(_exact, outcomes)) or np.any(columns @ columns.T != n * np.eye(len(columns))):
        return None
    columns = columns[columns.min(1) < 0]  # without the constant
    effects = np.abs(2 / n * columns @ [math.log(outcome.time) for outcome in outcomes])
    first = 1.5 * np.median(effects)
    error = 1.5 * np.median(effects[effects <= 2.5 * first])
    return float(error * math.sqrt(n) / 2), len(effects) / 3


# ---- the fit


def _estimate(columns: np.ndarray, outcomes: Sequence[Outcome]) -> Estimate:
    """Coefficients of columns (n, m), with a block for each seed where the seeds are crossed with the columns."""
    matrix, b = with_blocks(columns, outcomes)
    if all(map(_exact, outcomes)):
        times = np.log([outcome.time for outcome in outcomes])
        solution, _, rank, _ = np.linalg.lstsq(matrix, times, rcond=1e-10)
        degrees, residuals = len(times) - int(rank), times - matrix @ solution
        spread = math.sqrt(residuals @ residuals / degrees) if degrees else math.nan
        method: Literal["residual", "none"] = "residual" if degrees else "none"
        return Estimate(solution[b:], profile(matrix.T @ matrix, b), spread, degrees, method)
    return _censored(matrix, b, outcomes)


def with_blocks(columns: np.ndarray, outcomes: Sequence[Outcome]) -> tuple[np.ndarray, int]:
    """The columns after one for each seed, or after a constant where that would swallow effects; how many."""
    seeds = np.array([outcome.seed for outcome in outcomes])
    nuisances = np.ones((len(seeds), 1)), (seeds[:, None] == np.unique(seeds)).astype(float)
    matrices = [np.hstack([nuisance, columns]) for nuisance in nuisances]
    told = [np.linalg.matrix_rank(m) - n.shape[1] for m, n in zip(matrices, nuisances)]
    chosen = int(told[1] == told[0])
    return matrices[chosen], nuisances[chosen].shape[1]


def profile(information: np.ndarray, b: int) -> np.ndarray:
    """The information on all but the first b parameters, those estimated too."""
    cross = information[b:, :b]
    return information[b:, b:] - cross @ np.linalg.pinv(information[:b, :b], hermitian=True) @ cross.T


def _censored(matrix: np.ndarray, b: int, outcomes: Sequence[Outcome]) -> Estimate:
    low, high = np.array([log_ends(outcome) for outcome in outcomes]).T
    hit = np.isfinite(high)
    if not hit.any():
        raise ValueError(f"none of {len(outcomes)} runs reached the target, so no effect can be told")
    used = hit | solvable(matrix[hit], matrix)  # at its best the likelihood of the others is 1
    unused = int((~used).sum())
    _, sizes, basis = np.linalg.svd(matrix[used], full_matrices=False)
    basis = basis[sizes > 1e-10 * sizes[0]].T  # (m, rank)
    if hit.sum() <= basis.shape[1]:
        solution = np.linalg.lstsq(matrix[hit], (low + high)[hit] / 2, rcond=1e-10)[0]
        information = profile(matrix[hit].T @ matrix[hit], b)
        return Estimate(solution[b:], information, math.nan, 0, "none", unused)
    flat = np.zeros(basis.shape[1])
    point, _, hessian = newton(matrix[used] @ basis, low[used], high[used], flat)
    information = np.linalg.inv(covariance(point, hessian))
    count = int(used.sum())
    degrees = count - basis.shape[1]
    return Estimate(
        (basis @ point[:-1] / point[-1])[b:],
        profile(basis @ information @ basis.T, b),
        math.sqrt(count / degrees) / point[-1],
        degrees,
        "censored",
        unused,
    )


def newton(
    matrix: np.ndarray, low: np.ndarray, high: np.ndarray, precision: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:
    """Maximise the likelihood of log times between low and high, (n,), as in `survival`, where β / sd has the
    prior precision (m,); matrix (n, m) of full rank, or with a precision that makes up for it. Returns
    (β / sd, 1 / sd), (m + 1,), the log posterior and its negative Hessian there.

    In these coordinates it is concave (Olsen 1978), so that steps, halved where they overshoot, end at the
    one maximum.
    """
    prior = np.append(precision, 0.0)

    def at(point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        found = log_likelihood(low[None], high[None], matrix, point[None])
        value = float(found.value[0]) - float(prior @ point**2) / 2
        return value, found.gradient[0] - prior * point, np.diag(prior) - found.hessian[0]

    middle = np.where(np.isfinite(high), (low + high) / 2, low)
    start = np.linalg.lstsq(matrix, middle, rcond=None)[0]
    point = np.append(start, 1.0) / max(float(np.std(middle - matrix @ start)), 1e-3)
    value, slope, hessian = at(point)
    for _ in range(ITERATIONS):
        step = np.linalg.solve(hessian, slope)
        if step @ slope < 1e-10:
            break
        while point[-1] + step[-1] <= 0 or at(point + step)[0] < value - 1e-9:
            step /= 2
        point = point + step
        value, slope, hessian = at(point)
    return point, value, hessian


def covariance(point: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Of β, for an sd of 1, from that of (β / sd, 1 / sd)."""
    towards = np.hstack([np.eye(len(point) - 1), -point[:-1, None] / point[-1]])
    return towards @ np.linalg.inv(hessian) @ towards.T


def _exact(outcome: Outcome) -> bool:
    return outcome.reached and outcome.before is None


def _measured(found: Fit, base: np.ndarray, other: np.ndarray) -> SpeedUp | None:
    """The speed-up of one composition over another from their own runs."""
    arms = [[o for row, o in zip(found.rows, found.outcomes) if (row == one).all()] for one in (base, other)]
    return speed_up(arms[0], arms[1], found.confidence) if all(arms) else None
