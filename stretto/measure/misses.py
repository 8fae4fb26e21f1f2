"""What a race shows where runs missed the target: when arms get there, and what a hit costs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from stretto.measure import survival
from stretto.measure.drawing import Colours, Drawing, Line
from stretto.measure.outcomes import Interval, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stretto.measure.summary import Arm, Summary


class Missed(NamedTuple):
    """One arm of such a race, in its unit, "wall" seconds or "steps"; ratios are of the reference over the arm."""

    median: Interval  # when half of its runs are there, by Kaplan and Meier; infinite where that is later
    per_hit: float  # all that was spent over the number of hits: the cost with restarts, no speed-up
    restricted: Interval | None  # ratio of the means of min(time, horizon); none for the reference
    logrank: float | None  # p-value of no difference; none for the reference


def missed(summary: Summary) -> dict[str, Missed]:
    """Each arm with runs, by name; empty where all reached the target, and where none did."""
    outcomes = _outcomes(summary)
    every = [outcome.reached for arm in outcomes.values() for outcome in arm]
    if summary.race["target"] is None or all(every) or not any(every):
        return {}
    base = outcomes.get(summary.race["reference"])
    return {name: _of_arm(arm, None if arm is base else base) for name, arm in outcomes.items()}


def _of_arm(arm: list[Outcome], base: list[Outcome] | None) -> Missed:
    told = base and any(outcome.reached for outcome in (*base, *arm))
    return Missed(
        survival.median_time(arm),
        survival.expected_running_time(arm),
        survival.restricted_mean_ratio(base, arm) if base else None,
        survival.logrank(base, arm) if base and told else None,
    )


def _outcomes(summary: Summary) -> dict[str, list[Outcome]]:
    by = "wall" if summary.timed else "steps"
    arms: dict[str, Arm] = {arm.name: arm for arm in summary.arms if arm.results}
    longest = max((getattr(run, by) or 0.0 for arm in arms.values() for run in arm.results), default=0.0)
    return {name: [run.outcome(by, longest) for run in arm.results] for name, arm in arms.items()}


def reached_by_then(summary: Summary, colours: list[str]) -> Drawing | None:
    """The share of each arm's runs that have reached the target, over time; `colours` are the arms' variables."""
    if not missed(summary):
        return None
    words = "seconds of training" if summary.timed else "steps"
    return Drawing(
        "reached", "Runs that have reached the target",
        "share of each arm's runs at the target over time; medians are in the table of misses",
        (5.2, 3.2), (46, 42, 14, 40), partial(_draw, summary, colours, words),
        "By Kaplan and Meier: a run that stopped without reaching the target counts until then. A line ends with its "
        "arm's last run.",
    )  # fmt: skip


def _draw(summary: Summary, colours: list[str], words: str, axes: Axes, palette: Colours) -> list[Line]:
    outcomes = _outcomes(summary)
    for arm, variable in zip(summary.arms, colours):
        if arm.name not in outcomes:
            continue
        curve = survival.kaplan_meier(outcomes[arm.name])
        dashed = arm.name == summary.race.get("control")
        axes.step(
            [0.0, *curve.times], [0.0, *(1 - curve.share)], where="post", linewidth=1.4,
            color=palette[variable], linestyle=(0, (2.5, 1.5)) if dashed else "solid",
        )  # fmt: skip
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(0, 1.03 * max(outcome.time for arm in outcomes.values() for outcome in arm))
    axes.set_xlabel(words)
    axes.set_ylabel("share of the runs")
    return []
