"""A report's numbers for other programs, and its words in Markdown.

JSON: {"schema": 1, "suites": [{arm, seeds, workloads_too, workloads {name: interval}}], "reports": [report]}, suites of
arms that were raced in several of the reports. A report holds kind, id, created, workload, metric, falls, fingerprint,
target, target_valid, reference, control, answers [{arm, sentence}], caveats [sentence], arms, runs, study and quality
(null for others). Intervals are {estimate, low, high}; what is not known, and what is infinite, is null.
- arms: name, short, batch, budget (examples), parameters, memory (bytes), flops (of a step), seeds, reached,
  unfinished, times {wall, cpu (seconds), steps}, speed_up {wall, cpu, steps: interval with verdict, method,
  confidence, spread, p_value}, cost {step_efficiency, step_cost, overhead, total}, frontier {cost, quality,
  on_frontier, probability}, on_the_way [{target, speed_up}] to easier targets, misses {median, per_hit, restricted,
  logrank} in seconds, or in steps where some run has none
- runs: run, arm, seed, state, reached, steps, before (steps), fraction (of the budget), wall, cpu, compile, last
- study: methods, unit, answers [{method, alone, in_company, on_average}], interactions [{pair, effect}], gap {fitted,
  measured}, best {methods, speed_up, probability, shares, removal, drop}, sentences; all intervals are factors of
  speed, above 1 is faster
- quality: base, unit, sentences, recipes [{recipe, cost (of an example, over the baseline's), at and curve [{quality,
  budget, needed (examples), speed_up}]}]

CSV: one figure a row, report, figure, of, and, estimate, low, high, verdict: `of` is an arm, a run, a method or a
recipe, `and` a unit, the other method of a pair or a quality.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from stretto.measure import figures
from stretto.measure.equal import EqualSummary
from stretto.measure.misses import Missed, missed
from stretto.measure.on_the_way import on_the_way
from stretto.measure.outcomes import Interval
from stretto.measure.quality import Equal
from stretto.measure.sources import Part
from stretto.measure.statistics import SpeedUp
from stretto.measure.study_summary import StudySummary, factor
from stretto.measure.suite import Suite, suites, told
from stretto.measure.summary import Arm, Result, plain

UNITS = ("wall", "cpu", "steps")
COLUMNS = ("report", "figure", "of", "and", "estimate", "low", "high", "verdict")
TITLES = {"study": ("Methods", "Compositions"), "quality": ("At equal quality", "Trainings")}
Data = dict[str, Any]


def as_markdown(parts: Sequence[Part]) -> str:
    """The answer, what to know before believing it, and the tables."""
    over = [f"- {told(name, found)}" for name, found in _suites(parts).items()]
    blocks = ["# Over all workloads", "\n".join(over)] if over else []
    return "\n\n".join([*blocks, *map(_markdown, parts)]) + "\n"


def _suites(parts: Sequence[Part]) -> dict[str, Suite]:
    return suites([part.summary for part in parts])


def _markdown(part: Part) -> str:
    summary = part.summary
    own, raced = TITLES.get(part.kind, ("", "Race"))
    blocks = [f"# {part.title}", "\n".join(f"- {sentence}" for sentence in part.sentences)]
    if caveats := [*part.notes, *summary.warnings]:
        blocks += ["## Before you believe it", "\n".join(f"- {sentence}" for sentence in caveats)]
    if part.table:
        blocks += [f"## {own}", part.table]
    blocks += [f"## {raced}", plain(summary)]
    return "\n\n".join(blocks)


def as_json(parts: Sequence[Part]) -> str:
    """The reports as described above."""
    over = [_suite(name, found) for name, found in _suites(parts).items()]
    data = {"schema": 1, "suites": over, "reports": [as_data(part) for part in parts]}
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _suite(name: str, found: Suite) -> Data:
    return {
        "arm": name,
        "seeds": found.seeds._asdict(),
        "workloads_too": found.workloads_too._asdict(),
        "workloads": {workload: each._asdict() for workload, each in found.workloads.items()},
    }


def as_data(part: Part) -> Data:
    """One report."""
    summary, race = part.summary, part.summary.race
    fields = "workload", "metric", "falls", "fingerprint", "target", "target_valid", "reference", "control"
    return {
        "kind": part.kind,
        "id": part.id,
        "created": part.created,
        **{field: race.get(field) for field in fields},
        "answers": [{"arm": arm.name, "sentence": sentence} for arm, sentence in summary.answers],
        "caveats": [*part.notes, *summary.warnings],
        "arms": _arms(part),
        "runs": [_run(arm, result) for arm in summary.arms for result in arm.results],
        "study": part.study and _study(part.study, part),
        "quality": part.equal and _quality(part.equal),
    }


def _arms(part: Part) -> list[Data]:
    costs, places = figures.costs(part.summary), figures.places(part.summary)
    way, misses = on_the_way(part.summary), missed(part.summary)
    return [
        {
            "name": arm.name,
            "short": arm.short,
            "batch": arm.batch,
            "budget": arm.budget,
            "parameters": arm.parameters,
            "memory": arm.memory,
            "flops": arm.flops,
            "seeds": len(arm.results),
            "reached": arm.hits,
            "unfinished": arm.unfinished,
            "times": {unit: arm.mean(unit) for unit in UNITS},
            "speed_up": {unit: _speed_up(getattr(arm, unit)) for unit in UNITS},
            "cost": {**costs[arm.name]._asdict(), "total": costs[arm.name].total}
            if arm.name in costs
            else None,
            "frontier": places[arm.name]._asdict() if arm.name in places else None,
            "on_the_way": [
                {"target": target, "speed_up": _speed_up(ups[arm.name])}
                for target, ups in way.items()
                if arm.name in ups
            ],
            "misses": _misses(misses[arm.name]) if arm.name in misses else None,
        }
        for arm in part.summary.arms
    ]


def _misses(found: Missed) -> Data:
    return {
        "median": found.median._asdict(),
        "per_hit": found.per_hit,
        "restricted": found.restricted and found.restricted._asdict(),
        "logrank": found.logrank,
    }


def _run(arm: Arm, result: Result) -> Data:
    fields = (
        "run",
        "seed",
        "state",
        "reached",
        "steps",
        "before",
        "fraction",
        "wall",
        "cpu",
        "compile",
        "last",
    )
    return {"arm": arm.name, **{field: getattr(result, field) for field in fields}}


def _speed_up(found: SpeedUp | None) -> Data | None:
    fields = "estimate", "low", "high", "verdict", "method", "confidence", "spread", "p_value"
    return {field: getattr(found, field) for field in fields} if found else None


def _study(study: StudySummary, part: Part) -> Data:
    best = study.best
    return {
        "methods": list(study.methods),
        "unit": study.unit,
        "answers": [
            {
                "method": one.method,
                "alone": _effect(one.alone),
                "in_company": _effect(one.in_company),
                "on_average": _effect(one.on_average),
            }
            for one in study.answers
        ],
        "interactions": [{"pair": list(pair), "effect": _interval(found)} for pair, found in part.pairs],
        "gap": {"fitted": _interval(study.gap.fitted), "measured": _interval(study.gap.measured)},
        "best": best
        and {
            "methods": list(best.composition),
            "speed_up": _interval(best.speed_up),
            "probability": best.probability,
            "shares": {name: _interval(found) for name, found in best.shares.items()},
            "removal": {name: _interval(found) for name, found in best.removal.items()},
            "drop": list(best.drop),
        },
        "sentences": study.sentences,
    }


def _quality(found: EqualSummary) -> Data:
    return {
        "base": found.record["base"],
        "unit": found.unit,
        "sentences": found.sentences,
        "recipes": [
            {
                "recipe": one.name,
                "cost": _interval(one.cost),
                **{
                    name: [_equal(each) for each in points]
                    for name, points in (("at", one.at), ("curve", one.curve))
                },
            }
            for one in found.contestants
        ],
    }


def _equal(found: Equal) -> Data:
    return {
        "quality": found.quality,
        "budget": found.budget,
        "needed": _interval(found.needed),
        "speed_up": _speed_up(found.speed_up),
    }


def _interval(found: Interval | None) -> dict[str, float] | None:
    return found and found._asdict()


def _effect(found: Interval | None) -> dict[str, float] | None:
    return found and factor(found)._asdict()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(parts: Sequence[Part]) -> str:
    """The reports' figures as rows, with a head."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for name, found in _suites(parts).items():
        for of, interval in (("seeds", found.seeds), ("workloads too", found.workloads_too)):
            row = {"report": "", "figure": "suite", "of": name, "and": of, **interval._asdict()}
            writer.writerow(_finite(row))
    for part in parts:
        writer.writerows({"report": part.id, **row} for row in _rows(_finite(as_data(part))))
    return file.getvalue()


def _rows(report: Data) -> Iterator[Data]:
    for arm in report["arms"]:
        for unit in UNITS:
            yield {"figure": "time", "of": arm["name"], "and": unit, "estimate": arm["times"][unit]}
            if found := arm["speed_up"][unit]:
                ends = {key: found[key] for key in ("estimate", "low", "high", "verdict")}
                yield {"figure": "speed-up", "of": arm["name"], "and": unit, **ends}
        for group in ("cost", "frontier"):
            for name, value in (arm[group] or {}).items():
                yield {"figure": group, "of": arm["name"], "and": name, "estimate": value}
        for way in arm["on_the_way"]:
            ends = {key: way["speed_up"][key] for key in ("estimate", "low", "high", "verdict")}
            yield {"figure": "on the way", "of": arm["name"], "and": way["target"], **ends}
        if misses := arm["misses"]:
            yield {"figure": "median", "of": arm["name"], **misses["median"]}
            yield {"figure": "per hit", "of": arm["name"], "estimate": misses["per_hit"]}
            yield {"figure": "restricted", "of": arm["name"], **(misses["restricted"] or {})}
            yield {"figure": "log-rank", "of": arm["name"], "estimate": misses["logrank"]}
        for name in ("parameters", "memory", "flops", "seeds", "reached"):
            yield {"figure": name, "of": arm["name"], "estimate": arm[name]}
    for run in report["runs"]:
        for unit in UNITS:
            yield {
                "figure": "run",
                "of": run["run"],
                "and": unit,
                "estimate": run[unit],
                "verdict": run["state"],
            }
    yield from _study_rows(report["study"] or {})
    yield from _quality_rows(report["quality"] or {})


def _study_rows(study: Data) -> Iterator[Data]:
    for one in study.get("answers", ()):
        for answer in ("alone", "in_company", "on_average"):
            yield {"figure": answer, "of": one["method"], **(one[answer] or {})}
    for one in study.get("interactions", ()):
        first, second = one["pair"]
        yield {"figure": "interaction", "of": first, "and": second, **(one["effect"] or {})}
    for how, found in study.get("gap", {}).items():
        yield {"figure": "gap", "and": how, **(found or {})}
    if best := study.get("best"):
        yield {"figure": "best", "of": " + ".join(best["methods"]), **best["speed_up"]}
        for figure in ("shares", "removal"):
            for name, found in best[figure].items():
                yield {"figure": figure, "of": name, **found}


def _quality_rows(quality: Data) -> Iterator[Data]:
    for one in quality.get("recipes", ()):
        yield {"figure": "cost of an example", "of": one["recipe"], **(one["cost"] or {})}
        for figure in ("at", "curve"):
            for point in one[figure]:
                found = point["speed_up"]
                ends = {key: found[key] for key in ("estimate", "low", "high", "verdict")}
                yield {
                    "figure": f"equal quality, {figure}",
                    "of": one["recipe"],
                    "and": point["quality"],
                    **ends,
                }
