"""Speed-ups to easier targets, from the same runs: whether a verdict hangs on where the target was set."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from stretto.measure.outcomes import Outcome, Row, find_crossing, outcome, smoothed
from stretto.measure.statistics import SpeedUp, speed_up

if TYPE_CHECKING:
    from stretto.measure.summary import Arm, Result, Summary

SHARES = (0.25, 0.5, 0.75)  # of the reference's steps to the target, whose metric there is an easier target


def on_the_way(summary: Summary) -> dict[float, dict[str, SpeedUp]]:
    """For each easier target, each arm's speed-up over the reference, by name: in wall time, or in steps where
    some run has no seconds. Empty without a target, a reference that reached it, or evaluations on the way.
    """
    race = summary.race
    reference = next((arm for arm in summary.arms if arm.name == race["reference"]), None)
    if race["target"] is None or reference is None or not reference.hits:
        return {}
    found: dict[float, dict[str, SpeedUp]] = {}
    for target in _targets(summary, reference):
        base = _outcomes(summary, reference, target)
        others = {arm.name: arm for arm in summary.arms if arm is not reference and arm.results}
        if base:
            arms = {name: _outcomes(summary, arm, target) for name, arm in others.items()}
            found[target] = {name: speed_up(base, runs) for name, runs in arms.items() if runs}
    return found


def _targets(summary: Summary, reference: Arm) -> list[float]:
    """The reference's metric at shares of its steps to the target, the easiest first; those that are easier than it."""
    falls, target = summary.race["falls"], summary.race["target"]
    found: list[float] = []
    for share in SHARES:
        seen = (_metric_at(result, share * result.steps) for result in reference.results if result.reached)
        values = [value for value in seen if value is not None]
        easier = float(f"{median(values):.4g}") if values else target
        last = found[-1] if found else None
        if (easier > target if falls else easier < target) and easier != last:
            found.append(easier)
    return found


def _metric_at(result: Result, step: float) -> float | None:
    """The metric at the last evaluation up to a step."""
    return next((value for at, _, value in reversed(result.points) if at <= step), None)


def _outcomes(summary: Summary, arm: Arm, target: float) -> list[Outcome]:
    """When each run of an arm reached an easier target; empty where some run was never evaluated."""
    metric, falls, timed = summary.race["metric"], summary.race["falls"], summary.timed
    outcomes = []
    for result in arm.results:
        rows: list[Row] = [
            {"step": step, "unit": wall if timed else step, metric: value}
            for step, wall, value in result.points
        ]
        if not rows or any(not row["unit"] for row in rows):
            return []
        judged = smoothed(rows, metric, summary.race.get("smooth", 1))
        crossing = find_crossing(judged, metric, target, falls, rows[-1]["step"])
        outcomes.append(outcome(rows, crossing, result.seed, "unit"))
    return outcomes
