"""A suite of workloads: the geometric mean of speed-ups, for these workloads and for workloads like them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stretto.measure import survival
from stretto.measure.outcomes import Interval, Outcome
from stretto.measure.statistics import deviation, mean
from stretto.measure.study_summary import shown

if TYPE_CHECKING:
    from stretto.measure.summary import Arm, Summary

Arms = tuple[Sequence[Outcome], Sequence[Outcome]]  # the base's runs, and the contestant's


class LogRatio(NamedTuple):
    """A workload's log speed-up, its standard error and the error's degrees of freedom."""

    estimate: float
    error: float
    degrees: float


@dataclass(frozen=True)
class Suite:
    """A geometric mean with two intervals: had these workloads been run on other seeds, or others been chosen."""

    workloads: dict[str, Interval]  # the speed-up on each
    seeds: Interval
    workloads_too: Interval  # (0, inf) with a single workload


def suite(workloads: Mapping[str, Arms], confidence: float = 0.95) -> Suite:
    """The geometric mean of speed-ups, base over contestant, each workload counting the same.

    Seeds only: errors of the workloads' log ratios summed, Satterthwaite's degrees of freedom. Workloads too:
    Student's interval over the log ratios, which differ by seeds and by workload: on eight simulated workloads
    it covers .95, where a percentile bootstrap covers .89. ValueError for an arm without a hit, which has no
    place in a mean, or with one run.
    """
    if not workloads:
        raise ValueError("a suite wants one workload or more")
    ratios = {name: log_ratio(name, *arms) for name, arms in workloads.items()}
    estimates = [ratio.estimate for ratio in ratios.values()]
    across = math.inf
    if len(ratios) > 1:
        across = deviation(estimates) / math.sqrt(len(ratios))
    return Suite(
        workloads={name: _speed_up(ratio, confidence) for name, ratio in ratios.items()},
        seeds=_speed_up(_mean(list(ratios.values())), confidence),
        workloads_too=_speed_up(LogRatio(mean(estimates), across, max(len(ratios) - 1, 1)), confidence),
    )


def suites(summaries: Sequence[Summary]) -> dict[str, Suite]:
    """Recipes that were raced against the reference in two or more races, by name, in wall time.

    A race has no part in it where an arm never reached the target or has a single run, and where some run has no
    seconds that compare.
    """
    found: dict[str, dict[str, Arms]] = {}
    names = Counter(summary.race["workload"] for summary in summaries)
    for summary in summaries:
        reference = next((arm for arm in summary.arms if arm.name == summary.race["reference"]), None)
        workload = summary.race["workload"]
        place = workload if names[workload] == 1 else f"{workload} to {summary.goal}"
        for arm in summary.arms:
            skipped = (summary.race["reference"], summary.race.get("control"))
            if reference and arm.wall and arm.name not in skipped and _counts(reference) and _counts(arm):
                found.setdefault(arm.name, {})[place] = (_outcomes(reference), _outcomes(arm))
    return {name: suite(races) for name, races in found.items() if len(races) > 1}


def told(name: str, found: Suite) -> str:
    """A suite in words."""
    return (
        f"{name} over {len(found.workloads)} workloads: {shown(found.seeds)} on the geometric mean, had they been "
        f"run on other seeds; {shown(found.workloads_too)}, had others been chosen."
    )


def _counts(arm: Arm) -> bool:
    return arm.timed and arm.hits > 0 and len(arm.results) > 1


def _outcomes(arm: Arm) -> list[Outcome]:
    longest = max(result.wall or 0.0 for result in arm.results)
    return [result.outcome("wall", longest) for result in arm.results]


def log_ratio(name: str, base: Sequence[Outcome], other: Sequence[Outcome]) -> LogRatio:
    """A workload's log ratio: of pairs where both arms have the same seeds, else Welch's; with misses, from the
    likelihood.
    """
    if min(len(base), len(other)) < 2:
        raise ValueError(f"{name}: an interval needs 2 runs or more of each arm")
    if not all(any(outcome.reached for outcome in arm) for arm in (base, other)):
        raise ValueError(
            f"{name}: an arm has no hit, so its speed-up is a bound; leave the workload out and say so"
        )
    if not all(outcome.reached for outcome in (*base, *other)):
        return _censored(base, other)
    by_seed = [{outcome.seed: math.log(outcome.time) for outcome in arm} for arm in (base, other)]
    if by_seed[0].keys() == by_seed[1].keys() and len(by_seed[0]) == len(base) == len(other):
        return _mean_of([by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0]])
    first, second = (_mean_of([math.log(outcome.time) for outcome in arm]) for arm in (base, other))
    error, degrees = _pooled([first, second])
    return LogRatio(first.estimate - second.estimate, error, degrees)


def _censored(base: Sequence[Outcome], other: Sequence[Outcome]) -> LogRatio:
    """Half the width of the likelihood's interval over its t, which has N − 2 degrees of freedom."""
    from scipy.special import stdtrit

    interval, degrees = survival.compare(base, other, 0.95).interval, len(base) + len(other) - 2
    return LogRatio(
        interval.estimate, (interval.high - interval.low) / 2 / float(stdtrit(degrees, 0.975)), degrees
    )


def _mean_of(values: Sequence[float]) -> LogRatio:
    return LogRatio(mean(values), deviation(values) / math.sqrt(len(values)), len(values) - 1)


def _mean(ratios: Sequence[LogRatio]) -> LogRatio:
    error, degrees = _pooled(ratios)
    return LogRatio(mean([ratio.estimate for ratio in ratios]), error / len(ratios), degrees)


def _pooled(parts: Sequence[LogRatio]) -> tuple[float, float]:
    """Standard error of a sum or difference, and Satterthwaite's degrees of freedom."""
    variance = math.fsum(part.error**2 for part in parts)
    if variance == 0:
        return 0.0, 1.0
    return math.sqrt(variance), 1 / math.fsum(
        (part.error**2 / variance) ** 2 / part.degrees for part in parts
    )


def _speed_up(ratio: LogRatio, confidence: float) -> Interval:
    from scipy.special import stdtrit

    reach = ratio.error * float(stdtrit(ratio.degrees, (1 + confidence) / 2)) if ratio.error > 0 else 0.0
    return Interval(
        math.exp(ratio.estimate), math.exp(ratio.estimate - reach), math.exp(ratio.estimate + reach)
    )
