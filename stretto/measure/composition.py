"""Which composition of methods to use, from a study's fitted effects, and what each member is worth.

How much methods interact is averaged over: interactions γ_ij ~ N(0, τ²), with τ weighted by how likely it makes the
runs, from 0 (the product of the parts) upwards (every interaction as measured). Members' shares: Shapley 1953.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from stretto.measure.designs import Composition, expand, present, solvable
from stretto.measure.effects import Fit, covariance, log_ends, newton, profile, with_blocks
from stretto.measure.outcomes import Interval

SCALES = np.geomspace(0.03, 30.0, 31)  # τ, in units of one run's spread
DRAWS = 2000
MOST = 12  # methods of which all compositions are compared
FAINT = 1e-6  # prior precision of what is not shrunk: keeps what no run tells from being infinite


@dataclass(frozen=True)
class Best:
    """The allowed composition with the least expected log time. Intervals are of factors, above 1 is faster."""

    composition: Composition
    speed_up: Interval  # over the baseline
    probability: float  # that no other is faster
    shares: dict[str, Interval]  # each member's factor of the speed-up; the estimates multiply to it
    removal: dict[str, Interval]  # what leaving a member out costs
    drop: tuple[str, ...]  # members whose removal is not known to cost anything


def best(found: Fit, allowed: Callable[[Composition], bool] = lambda composition: True) -> Best:
    """The composition to use, with its interval, what each member gives, and which could be dropped.

    A member's share is Shapley's, on the fitted surface β_i + ½ Σ γ_ij over the other members. ValueError where
    the runs leave no spread to judge by, for more than MOST methods, or where nothing is allowed.
    """
    k = len(found.methods)
    if k > MOST:
        raise ValueError(f"the best of 2^{k} compositions is not searched for; study at most {MOST} methods")
    if found.estimate.method == "none" and found.exact:
        raise ValueError(f"these {len(found.rows)} runs leave no spread to judge by; add a seed")
    mean, draws = posterior(found)
    rows, untold = np.array(list(product((0, 1), repeat=k))), ~_told(found)
    able = [not row[untold].any() and allowed(present(found.methods, row)) for row in rows]
    if not any(able):
        raise ValueError(f"none of the {2**k} compositions of {', '.join(found.methods)} is allowed")
    rows = rows[able]
    surface = expand(rows, found.model)
    chosen = int(np.argmin(surface @ mean))
    members = [i for i in range(k) if rows[chosen, i]]
    gains = {i: surface[chosen] * [i in term for term in found.model] for i in members}

    def factor(weights: np.ndarray) -> Interval:
        tail = (1 - found.confidence) / 2
        slow, fast = np.quantile(draws @ weights, (1 - tail, tail))
        return Interval(math.exp(-mean @ weights), math.exp(-slow), math.exp(-fast))

    removal = {found.methods[i]: factor(gain) for i, gain in gains.items()}
    halves = np.array([1 / len(term) for term in found.model])
    return Best(
        composition=present(found.methods, rows[chosen]),
        speed_up=factor(surface[chosen]),
        probability=float((np.argmin(surface @ draws.T, axis=0) == chosen).mean()),
        shares={found.methods[i]: factor(gain * halves) for i, gain in gains.items()},
        removal=removal,
        drop=tuple(name for name, interval in removal.items() if interval.low <= 1),
    )


def posterior(found: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients averaged over τ: their mean (m,) and DRAWS draws (DRAWS, m), the same at each call.

    τ / spread has a half-Cauchy prior.
    """
    given = list(_given_times(found) if found.exact else _given_misses(found))
    logs = np.array([one.log_evidence for one in given]) + np.log(SCALES / (1 + SCALES**2))
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    means, roots = np.array([one.mean for one in given]), np.array([one.root for one in given])
    rng = np.random.default_rng(0)
    which = rng.choice(len(given), size=DRAWS, p=weights)
    degrees = given[0].degrees
    wide = np.sqrt(degrees / rng.chisquare(degrees, DRAWS))
    normal = np.einsum("dm,dnm->dn", rng.standard_normal((DRAWS, means.shape[1])), roots[which])
    return weights @ means, means[which] + wide[:, None] * normal


class _Given(NamedTuple):
    """Coefficients given τ: Student's distribution."""

    log_evidence: float  # of the runs, up to a constant
    mean: np.ndarray  # (m,)
    root: np.ndarray  # (m, m), of the covariance
    degrees: float


def _given_times(found: Fit) -> Iterator[_Given]:
    """By least squares: all in closed form."""
    known, pairs = found.estimate, _pairs(found)
    score = known.information @ known.coefficients
    told = np.linalg.matrix_rank(
        profile(known.information, len(found.methods))
    )  # interactions, beside methods
    degrees = known.degrees + told
    for scale in SCALES:
        precision = known.information + np.diag(np.where(pairs, scale**-2, FAINT))
        mean = np.linalg.solve(precision, score)
        misfit = known.degrees * known.spread**2 + max(float(score @ (known.coefficients - mean)), 0.0)
        variance = max(misfit / degrees, 1e-18)
        log = -np.linalg.slogdet(precision)[1] / 2 - pairs.sum() * math.log(scale)
        root = np.linalg.cholesky(variance * np.linalg.inv(precision))
        yield _Given(log - degrees / 2 * math.log(variance), mean, root, degrees)


def _given_misses(found: Fit) -> Iterator[_Given]:
    """By Laplace's approximation, with all runs: those that always missed tell of interactions that hurt."""
    matrix, b = with_blocks(expand(found.rows, found.model), found.outcomes)
    low, high = np.array([log_ends(outcome) for outcome in found.outcomes]).T
    shrunk = np.append(np.zeros(b, dtype=bool), _pairs(found))
    fixed = b + len(found.methods)
    degrees = max(len(matrix) - fixed, 1)
    for scale in SCALES:
        point, value, hessian = newton(matrix, low, high, np.where(shrunk, scale**-2, FAINT))
        log = value - np.linalg.slogdet(hessian)[1] / 2 - shrunk.sum() * math.log(scale)
        log -= (fixed + 1) * math.log(point[-1])  # a flat prior on β and log sd, in these coordinates
        spread = math.sqrt(len(matrix) / degrees) / point[-1]
        root = spread * np.linalg.cholesky(covariance(point, hessian)[b:, b:])
        yield _Given(log, point[b:-1] / point[-1], root, degrees)


def _pairs(found: Fit) -> np.ndarray:
    return np.array([len(term) == 2 for term in found.model])


def _told(found: Fit) -> np.ndarray:
    """The methods that some run has and some other has not, (k,)."""
    matrix, b = with_blocks(expand(found.rows, found.model), found.outcomes)
    information = profile(matrix.T @ matrix, b) + np.diag(1.0 * _pairs(found))
    return solvable(information, np.eye(len(information)))[: len(found.methods)]
