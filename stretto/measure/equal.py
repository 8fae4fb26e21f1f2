"""What trainings at several budgets showed: the speed-up of each recipe over the baseline at equal quality.

From stored runs only. A speed-up is the ratio of the budgets that reach a quality, times that of what an example
costs in seconds; where seconds do not compare, it is in examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from stretto.measure import caveats, figures
from stretto.measure.outcomes import Interval, Outcome
from stretto.measure.quality import FEWEST, Equal, Place, Trained, equal_quality, speed_up_curve
from stretto.measure.statistics import SpeedUp, speed_up, welch_interval
from stretto.measure.store import Store
from stretto.measure.study_summary import _markdown, shown
from stretto.measure.summary import Summary, count, seconds, summarise

Unit = Literal["wall", "examples"]


class Cell(NamedTuple):
    """A recipe at one budget, with the runs that count."""

    recipe: str
    share: float  # of the recipe's own budget
    runs: list[Trained]
    costs: list[float]  # seconds an example; empty where they do not compare


@dataclass(frozen=True)
class Contestant:
    """A recipe against the baseline."""

    name: str
    cells: tuple[Cell, ...]
    at: tuple[Equal, ...]  # at the quality of each cell
    curve: tuple[Equal, ...]  # empty for fewer than 4 budgets, and where the two have no quality in common
    cost: Interval | None  # seconds an example costs it over what it costs the baseline

    @property
    def main(self) -> tuple[Cell, Equal]:
        """At its own budget, or the nearest to it that was trained."""
        return min(zip(self.cells, self.at), key=lambda pair: abs(math.log(pair[0].share)))


@dataclass(frozen=True)
class EqualSummary:
    """What a comparison at equal quality showed."""

    record: dict[str, Any]  # as stored
    race: Summary
    contestants: tuple[Contestant, ...]  # the fastest first; none where the baseline has no curve
    places: dict[str, Place]  # between cost and quality, by arm
    answers: list[str]  # one of each contestant, or why there is none
    details: list[str]
    unit: Unit = "wall"

    @property
    def sentences(self) -> list[str]:
        """What it showed, the answers first."""
        return [*self.answers, *self.details]


def summarise_quality(store: Store, record: dict[str, Any]) -> EqualSummary:
    """The numbers of a comparison from its stored runs. ValueError for one that has not been trained."""
    if record.get("race") is None:
        raise ValueError(
            f"quality {record['id']} has no race yet: it is {record['state']}; run it again to go on"
        )
    race = summarise(store, store.race(record["race"]))
    unit: Unit = "wall" if race.timed else "examples"
    cells, left_out = _cells(record, race, unit)
    base = [cell for cell in cells if cell.recipe == record["base"]]
    others = dict.fromkeys(cell.recipe for cell in cells if cell.recipe != record["base"])
    found: list[Contestant] = []
    if len(base) >= FEWEST:
        found = [_contestant(base, [cell for cell in cells if cell.recipe == name], race) for name in others]
    found.sort(key=lambda one: one.main[1].speed_up.estimate or one.main[1].speed_up.low, reverse=True)
    kept = [warning for warning in race.warnings if warning not in {*caveats.state(race)}]
    race = replace(
        race,
        race=race.race | {"recipes": {arm["name"]: arm["recipe"] for arm in record["arms"]}},
        warnings=(*_caveats(record, race, unit), *left_out, *kept),
    )
    places = figures.places(race)
    metric, name = race.race["metric"], record["base"]
    answers = [_answer(one, name, metric, unit) for one in found] or [_why(name, len(base))]
    details = [text for one in found for text in _details(one, name, metric)]
    details += _frontier(places, race, unit)
    return EqualSummary(record, race, tuple(found), places, answers, details, unit)


def equal_cells(summary: EqualSummary) -> tuple[list[str], list[list[str]]]:
    """The table: its head, and a row of text for each recipe and budget."""
    metric, base = summary.race.race["metric"], summary.record["base"]
    head = ["recipe", "its budget", f"its {metric}", f"what {base} needs for it", "speed-up", "verdict"]
    rows = [
        [
            one.name,
            f"{100 * cell.share:g} %, {count(found.budget)} examples",
            f"{found.quality:.4g}",
            _needed(found.needed),
            found.speed_up.figures or "not told",
            found.speed_up.verdict,
        ]
        for one in summary.contestants
        for cell, found in zip(one.cells, one.at)
    ]
    return head, rows


def equal_table(summary: EqualSummary) -> str:
    """Speed-ups at the quality of each budget, then the frontier of cost and quality; Markdown."""
    tables = [_markdown(*equal_cells(summary))] if summary.contestants else []
    if summary.places:
        timed = summary.unit == "wall"
        trained = "time trained" if timed else "steps trained"
        head = ["frontier", trained, f"final {summary.race.race['metric']}", "on it", "probability"]
        rows = [
            [
                name,
                seconds(place.cost) if timed else f"{place.cost:.0f}",
                f"{place.quality:.4g}",
                "yes" if place.on_frontier else "no",
                f"{place.probability:.2f}",
            ]
            for name, place in summary.places.items()
        ]
        tables.append(_markdown(head, rows))
    return "\n\n".join(tables)


# ---- numbers


def _cells(record: dict[str, Any], race: Summary, unit: Unit) -> tuple[list[Cell], list[str]]:
    """The arms that have a mean quality, and a sentence on each that has none."""
    arms = {arm.name: arm for arm in race.arms}
    cells, told = [], []
    for entry in record["arms"]:
        arm = arms[entry["name"]]
        budget, done = arm.budget or 0, [result for result in arm.results if result.last is not None]
        ended = [result for result in done if result.state != "failed"]
        if failed := len(arm.results) - len(ended):
            told.append(
                f"{arm.label} is left out: {failed} of its {len(arm.results)} runs ended without a quality."
            )
        elif len(ended) < 2:
            told.append(
                f"{arm.label} is left out: it has {len(ended)} finished runs, and an interval wants 2."
            )
        else:
            runs = [Trained(result.seed, budget, result.last or 0.0) for result in ended]
            costs = [(result.wall or 0.0) / budget for result in ended] if unit == "wall" else []
            cells.append(Cell(entry["recipe"], entry["share"], runs, costs))
    return cells, told


def _contestant(base: Sequence[Cell], other: Sequence[Cell], race: Summary) -> Contestant:
    runs = [[one for cell in cells for one in cell.runs] for cells in (base, other)]
    costs = [[one for cell in cells for one in cell.costs] for cells in (base, other)]
    falls, timed = race.race["falls"], all(costs)
    prices: dict[str, Any] = {"base_cost": costs[0], "other_cost": costs[1]} if timed else {}
    at = equal_quality(*runs, falls=falls, **prices)
    curve = speed_up_curve(*runs, falls=falls, **prices) if len(other) >= FEWEST else []
    cost = None
    if timed:
        logs = [[math.log(one) for one in each] for each in costs]
        cost = Interval(*map(math.exp, welch_interval(logs[1], logs[0])))
    return Contestant(other[0].recipe, tuple(other), tuple(at), tuple(curve), cost)


def _clock(race: Summary) -> SpeedUp | None:
    """The time of the reference over that of its control, which trained the same."""
    arms = {arm.name: arm for arm in race.arms}
    pair = (arms[race.race[name]].results for name in ("reference", "control"))
    base, control = ([Outcome(run.seed, run.wall) for run in results if run.wall] for results in pair)
    return speed_up(base, control) if base and control else None


# ---- words


def _why(base: str, budgets: int) -> str:
    if budgets < FEWEST:
        return f"No speed-up can be told: {base} has a mean quality at {budgets} budgets, and its curve wants {FEWEST}."
    return f"No speed-up can be told: no recipe but {base} has a mean quality at any budget."


def _answer(one: Contestant, base: str, metric: str, unit: Unit) -> str:
    cell, found = one.main
    conditions = f"{len(cell.runs)} seeds, {'wall time' if unit == 'wall' else 'in examples'}"
    where = f"{metric} {found.quality:.4g}, which it has after {100 * cell.share:g} % of its budget"
    if not found.speed_up.figures:
        return f"Nothing can be told of {one.name} against {base} at {where} ({conditions})."
    ratio = f"{found.speed_up.figures} the speed of {base}"
    return f"{one.name} has {ratio} at {where}: {found.speed_up.verdict} ({conditions})."


def _details(one: Contestant, base: str, metric: str) -> list[str]:
    sentences = []
    ratio = one.main[1].speed_up
    if ratio.low == 0 and math.isinf(ratio.high):
        sentences.append(
            f"The seeds differ in {metric} as much as the budgets of {base} do: more seeds would tell more, or "
            "budgets further apart."
        )
    if one.curve:
        first, last = one.curve[0], one.curve[-1]
        sentences.append(
            f"Over the qualities that both reach it goes from {first.speed_up.figures} at {metric} "
            f"{first.quality:.4g} to {last.speed_up.figures} at {last.quality:.4g}."
        )
    elif len(one.cells) >= FEWEST:
        sentences.append(f"{one.name} and {base} have no {metric} in common at these budgets.")
    if one.cost:
        sentences.append(f"An example takes {one.name} {shown(one.cost)} the time that it takes {base}.")
    return sentences


def _frontier(places: dict[str, Place], race: Summary, unit: Unit) -> list[str]:
    edge = sorted(
        (name for name, place in places.items() if place.on_frontier), key=lambda name: places[name].cost
    )
    if not edge:
        return []
    listed = ", ".join(f"{name} ({places[name].probability:.2f})" for name in edge)
    what, metric = "time" if unit == "wall" else "steps", race.race["metric"]
    return [
        f"No other is both cheaper in {what} and better in {metric} (with this probability) than {listed}."
    ]


def _caveats(record: dict[str, Any], race: Summary, unit: Unit) -> list[str]:
    told = []
    if record["state"] == "interrupted":
        told.append("It was interrupted: this is what it has so far.")
    if unit == "examples":
        why = next((arm.why for arm in race.arms if not arm.timed), "") or "some runs have none"
        told.append(f"Seconds are not compared: {why}. Speed-ups are in examples.")
    clock = _clock(race)
    if clock and clock.verdict != "not resolved":
        told.append(
            f"The control, {race.race['reference']} trained again beside itself, came out at {clock.figures} in wall "
            "time, which excludes 1: differences of this size are this machine's noise."
        )
    return told


def _needed(found: Interval) -> str:
    """The baseline's budget in examples, or its bound."""
    if math.isinf(found.estimate):
        return f"> {count(round(found.low))}" if found.low > 0 else "not told"
    if found.estimate == 0:
        return f"< {count(round(found.high))}" if math.isfinite(found.high) else "not told"
    low = count(round(found.low)) if found.low > 0 else "open"
    high = count(round(found.high)) if math.isfinite(found.high) else "open"
    return f"{count(round(found.estimate))} [{low}, {high}]"
