"""AlgoPerf's score, external tuning: times to target, profiles, scores, and how far other seeds would move them.

Dahl et al. 2023, arXiv:2306.07179; Kasimbeg et al. 2025, arXiv:2502.15015. Logs are read by algoperf_logs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from stretto.measure.algoperf_logs import BASES, WORKLOADS, Trial, read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stretto.measure.algoperf_logs import Logs

    Floats = NDArray[np.float64]

Rule = Literal["time", "index"]
SLOWEST = 4.0  # times the fastest; what takes longer is a miss
POINTS = np.linspace(1.0, SLOWEST, 100)  # at which the official code looks at a profile
DRAWS = 4000


@dataclass(frozen=True)
class Standings:
    """Submissions (S,), the best first. A miss is infinite; where there are no logs, `times` is NaN."""

    rule: Rule
    submissions: tuple[str, ...]
    times: Floats  # (S, 14) seconds to the target, in the order of WORKLOADS
    ratios: Floats  # (S, 8) to the fastest on each base workload, held-out variants taken into account
    scores: Floats  # (S,) as the official code integrates profiles
    exact: Floats  # (S,) the integral itself, within 0.00505 of it
    intervals: Floats  # (S, 2) of the scores
    above: Floats  # (S, S) how probably the submission of the row would score above that of the column
    notes: tuple[str, ...]


def score(path: Path, rule: Rule = "time", draws: int = DRAWS, confidence: float = 0.95) -> Standings:
    """Standings from a log tree or a table. ValueError where there are no logs."""
    return standings(read(path), rule, draws, confidence)


def standings(logs: Logs, rule: Rule = "time", draws: int = DRAWS, confidence: float = 0.95) -> Standings:
    """Standings from logs; intervals from studies drawn with replacement within each workload and submission.

    Three to five studies are few: such intervals are rather too narrow.
    """
    submissions, studies = study_times(logs, rule)
    times = median(studies)
    ratios = to_fastest(times)
    scores = official(ratios)
    drawn = official(to_fastest(median(redrawn(studies, draws))))
    ends = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).T
    above = np.mean(drawn[:, :, None] > drawn[:, None, :], axis=0)
    above += np.mean(drawn[:, :, None] == drawn[:, None, :], axis=0) / 2
    best = np.argsort(-scores, kind="stable")
    return Standings(
        rule=rule,
        submissions=tuple(submissions[i] for i in best),
        times=times[best],
        ratios=ratios[best],
        scores=scores[best],
        exact=exact(ratios)[best],
        intervals=ends[best],
        above=above[np.ix_(best, best)],
        notes=(*logs.notes, *_absent(submissions, times)),
    )


def study_times(logs: Logs, rule: Rule) -> tuple[list[str], Floats]:
    """Submissions (S,), and the time to target (S, 14, K) of each study's best trial, NaN where there is none.

    By "time", the best trial is the one soonest at the target. The official code takes the one that needed
    the fewest evaluations, ties in listing order: that is "index".
    """
    submissions = sorted({trial.submission for trial in logs.hits})
    studies = sorted({trial.study for trial in logs.hits})
    places = {workload: i for i, workload in enumerate(WORKLOADS)}
    best: dict[Trial, tuple[float, float]] = {}  # by the first trial of a study: what is compared, seconds
    for trial in sorted(logs.hits):
        hit = logs.hits[trial]
        study, rank = trial._replace(trial=0), hit.before if rule == "index" else hit.time
        if study not in best or rank < best[study][0]:
            best[study] = rank, hit.time
    times = np.full((len(submissions), len(WORKLOADS), len(studies)), np.nan)
    for study, (_, seconds) in best.items():
        row, column = submissions.index(study.submission), studies.index(study.study)
        times[row, places[study.workload], column] = seconds
    return submissions, times


def median(studies: Floats) -> Floats:
    """The median over the last axis, in which misses (infinite) take part and absent studies (NaN) do not."""
    ordered = np.sort(studies, axis=-1)  # NaN last
    count = np.maximum(np.sum(~np.isnan(studies), axis=-1, keepdims=True), 1)
    lower, upper = (np.take_along_axis(ordered, at, -1)[..., 0] for at in ((count - 1) // 2, count // 2))
    return (lower + upper) / 2


def to_fastest(times: Floats) -> Floats:
    """Ratios (..., S, 8) to the fastest submission from times (..., S, 14); a miss is infinite.

    A held-out variant counts only where its base was reached, a time above 4x the fastest is a miss, and
    a missed variant makes its base a miss.
    """
    base, variant = np.split(np.where(np.isnan(times), np.inf, times), [len(BASES)], axis=-1)
    of = [BASES.index(workload.base) for workload in WORKLOADS.values()][len(BASES) :]
    variant = _in_reach(np.where(np.isinf(base[..., of]), np.inf, variant))
    base = _in_reach(base)
    base[..., of] = np.where(np.isinf(variant), np.inf, base[..., of])
    fastest = base.min(axis=-2, keepdims=True)
    return base / np.where(np.isinf(fastest), 1.0, fastest)


def _in_reach(times: Floats) -> Floats:
    return np.where(times > SLOWEST * times.min(axis=-2, keepdims=True), np.inf, times)


def profile(ratios: Floats, tau: Sequence[float] | Floats) -> Floats:
    """Shares (S, len(tau)) of the base workloads on which a submission takes at most tau times the fastest."""
    return np.mean(ratios[:, None, :] <= np.asarray(tau)[:, None], axis=-1)


def exact(ratios: Floats) -> Floats:
    """The mean of a profile over tau in [1, 4]: mean over workloads of clip((4 − r) / 3, 0, 1)."""
    return np.mean(np.clip((SLOWEST - ratios) / (SLOWEST - 1), 0, 1), axis=-1)


def official(ratios: Floats) -> Floats:
    """The same by the trapezoid rule on 100 points: a workload counts half an interval before it is reached."""
    reached = np.searchsorted(POINTS, ratios)
    shares = (len(POINTS) - 0.5 - reached) / (len(POINTS) - 1)
    return np.mean(np.where(reached == 0, 1.0, np.maximum(shares, 0.0)), axis=-1)


def redrawn(studies: Floats, draws: int, seed: int = 0) -> Floats:
    """Studies (draws, S, W, K) drawn with replacement from those (S, W, K) that each cell has."""
    ordered = np.sort(studies, axis=-1)
    count = np.sum(~np.isnan(studies), axis=-1, keepdims=True)
    chance = np.random.default_rng(seed).random((draws, *studies.shape))
    chosen = np.take_along_axis(ordered[None], (chance * count).astype(np.int64), axis=-1)
    return np.where(np.arange(studies.shape[-1]) < count, chosen, np.nan)


def _absent(submissions: Sequence[str], times: Floats) -> list[str]:
    """A line for each submission without logs of some workload."""
    names = np.array(list(WORKLOADS))
    missing = ((name, names[np.isnan(row)]) for name, row in zip(submissions, times))
    return [f"{name} has no logs of {', '.join(what)}: missed" for name, what in missing if what.size]
