"""What a study showed: each method's effect alone, in company and on average, and the best composition.

From stored runs only. Effects are shown as factors of speed, exp(−effect on log time): above 1 is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from stretto.measure import composition, effects
from stretto.measure.designs import ANSWERS, Composition, Design
from stretto.measure.outcomes import Interval, Outcome
from stretto.measure.statistics import figure
from stretto.measure.store import Store
from stretto.measure.summary import Summary, summarise

Unit = Literal["wall", "steps"]


@dataclass(frozen=True)
class StudySummary:
    """What a study showed. Intervals of `answers` and `interactions` are on log time, those of `gap` and `best`
    are factors.
    """

    study: dict[str, Any]  # as stored
    race: Summary
    methods: tuple[str, ...]  # the factors, as labels
    fit: effects.Fit | None  # none where nothing can be estimated
    answers: list[effects.Answers]
    interactions: dict[tuple[str, str], Interval | None]
    gap: effects.Gap
    best: composition.Best | None
    sentences: list[str]  # the answer first
    unit: Unit = "wall"  # of the times that were fitted


def summarise_study(store: Store, study: dict[str, Any], unit: Unit = "wall") -> StudySummary:
    """The numbers of a study from its stored runs; on steps where the seconds of some run do not compare.

    ValueError for a study that has not been raced.
    """
    if study.get("race") is None:
        raise ValueError(
            f"study {study['id']} has no race yet: it is {study['state']}; run it again to go on"
        )
    race = summarise(store, store.race(study["race"]))
    raced = {arm.name: arm for arm in race.arms}
    unit = unit if all(raced[name].timed for name in study["arms"] if raced[name].results) else "steps"
    names = factors(study)
    found = _fit(study, race, unit)
    if found is None:
        nothing = effects.Gap(None, None)
        sentences = ["No run reached the target, so no effect can be told."]
        return StudySummary(study, race, names, None, [], {}, nothing, None, sentences, unit)
    told, pairs, gap = effects.answers(found), effects.interactions(found), effects.composition_gap(found)
    try:
        best, why = composition.best(found, allowed(study)), ""
    except ValueError as error:
        best, why = None, str(error)
    sentences = _sentences(study, found, told, pairs, gap, best, why, unit)
    return StudySummary(study, race, names, found, told, pairs, gap, best, sentences, unit)


def factors(study: dict[str, Any]) -> tuple[str, ...]:
    """The names of a study's methods, in the order of its design's columns."""
    return tuple(short.partition(":")[0] for short in study["methods"])


def design_of(study: dict[str, Any]) -> Design:
    """The design of a stored study."""
    stored = study["design"]
    words = tuple(map(tuple, stored["words"]))
    dropped = tuple(map(tuple, stored["dropped"]))
    return Design(stored["name"], factors(study), np.array(stored["rows"], dtype=int), words, dropped)


def allowed(study: dict[str, Any]) -> Callable[[Composition], bool]:
    """Whether a composition of a stored study can run: no two of its methods want one place, as far as was tried."""
    dropped = set(map(tuple, study["design"]["dropped"]))
    conflicts = [set(pair) for pair in study["design"]["conflicts"]]
    return lambda chosen: tuple(chosen) not in dropped and not any(pair <= set(chosen) for pair in conflicts)


def study_table(summary: StudySummary) -> str:
    """Methods by the three answers, then pairs, as factors of speed; Markdown, readable as it stands."""
    head = ["method", *ANSWERS, "measured alone", "measured in company"]
    rows = [
        [one.method, *map(_cell, (one.alone, one.in_company, one.on_average))]
        + [found.figures if found else "" for found in (one.measured_alone, one.measured_in_company)]
        for one in summary.answers
    ]
    pairs = [[" × ".join(pair), _cell(found)] for pair, found in summary.interactions.items() if found]
    tables = [_markdown(head, rows)]
    if pairs:
        tables.append(_markdown(["pair", "of the product of its parts"], pairs))
    return "\n\n".join(tables)


# ---- numbers


def _fit(study: dict[str, Any], race: Summary, unit: Unit) -> effects.Fit | None:
    """The surface through all runs of the design; pairs are assumed away where nothing could be told with them."""
    raced = {arm.name: arm for arm in race.arms}
    runs = [
        (row, r) for row, name in zip(study["design"]["rows"], study["arms"]) for r in raced[name].results
    ]
    if not any(result.reached for _, result in runs):
        return None
    longest = max(getattr(result, unit) or 0.0 for _, result in runs)
    outcomes: list[Outcome] = [result.outcome(unit, longest) for _, result in runs]
    if all(outcome.reached for outcome in outcomes):  # least squares on crossings' times, as in races
        outcomes = [replace(outcome, before=None) for outcome in outcomes]
    return effects.fit(
        factors(study), np.array([row for row, _ in runs]), outcomes, tells_with_pairs(design_of(study))
    )


def tells_with_pairs(design: Design) -> bool:
    """Whether a design tells of some method without the assumption that no two interact."""
    known = design.estimable()
    return any(known[answer] for answer in ANSWERS)


# ---- words


def _sentences(
    study: dict[str, Any],
    found: effects.Fit,
    told: list[effects.Answers],
    pairs: dict[tuple[str, str], Interval | None],
    gap: effects.Gap,
    best: composition.Best | None,
    why: str,
    unit: Unit,
) -> list[str]:
    name = study["reference"]["name"]
    fitted = f"fitted to {len(found.rows)} runs, {'wall time' if unit == 'wall' else 'in steps'}"
    if best is None:
        sentences = [f"No composition is recommended: {why}."]
    elif not best.composition:
        sentences = [
            f"None of {', '.join(found.methods)} is worth adding to {name} "
            f"(probability {best.probability:.2f}; {fitted})."
        ]
    else:
        sentences = [
            f"The best composition is {' + '.join(best.composition)}: {shown(best.speed_up)} over {name} "
            f"(probability {best.probability:.2f} that no other is faster; {fitted})."
        ]
        if best.drop and best.drop != best.composition:
            sentences.append(f"Leaving out {', '.join(best.drop)} is not known to cost anything.")
    if confirmation := study.get("confirmation"):
        mine = best is not None and list(best.composition) == confirmation["composition"]
        sentences.append(
            ("On fresh seeds: " if mine else "Another one, on fresh seeds: ") + confirmation["sentence"]
        )
    sentences += [_method_sentence(one) for one in sorted(told, key=_slowest)]
    sentences += [
        f"{a} and {b} together give {shown(factor(between))} of the product of their parts."
        for (a, b), between in pairs.items()
        if between and (between.low > 0 or between.high < 0)
    ]
    unresolved = [between for between in pairs.values() if between and between.low <= 0 <= between.high]
    if unresolved:
        sentences.append(f"Of {len(pairs)} interactions, {len(unresolved)} are told and not resolved.")
    if whole := gap.fitted or gap.measured:
        how = "from the fit" if gap.fitted else "measured"
        sentences.append(f"All together give {shown(whole)} of the product of what each gives alone ({how}).")
    if not any(len(term) == 2 for term in found.model):
        sentences.append("This assumes that no two methods interact: the design does not tell them apart.")
    if found.estimate.method == "lenth":
        sentences.append("With one seed, intervals assume that most effects are nil (Lenth's error).")
    if found.estimate.unused:
        sentences.append(f"{found.estimate.unused} runs that missed the target bound no effect.")
    return sentences


def _method_sentence(one: effects.Answers) -> str:
    answers = zip(ANSWERS, (one.alone, one.in_company, one.on_average))
    told = [f"{shown(factor(found))} {answer}" for answer, found in answers if found]
    return f"{one.method}: {', '.join(told) or 'nothing can be told of it'}."


def _slowest(one: effects.Answers) -> float:
    found = one.on_average or one.in_company or one.alone
    return found.estimate if found else math.inf


def factor(effect: Interval) -> Interval:
    """An effect on log time as a factor of speed."""
    return Interval(*(_exp(-value) for value in (effect.estimate, effect.high, effect.low)))


def shown(found: Interval) -> str:
    """A factor as a reader wants it: 1.42x [1.31, 1.55]."""
    if found.low == 0 and math.isinf(found.high):
        return f"{figure(found.estimate)}x (no interval)"
    return f"{figure(found.estimate)}x [{figure(found.low)}, {figure(found.high)}]"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _cell(effect: Interval | None) -> str:
    return shown(factor(effect)) if effect else "not told"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    )
