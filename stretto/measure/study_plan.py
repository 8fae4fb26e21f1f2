"""Planning a study: which compositions of methods to run, for how long, and what they will tell.

A composition is the reference with methods added; what the reference holds in a method's place gives way to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stretto.core import Method, Recipe, short_form
from stretto.measure import designs, effects, forecast
from stretto.measure.designs import Composition, Design
from stretto.measure.forecast import in_words, told
from stretto.measure.outcomes import Outcome
from stretto.measure.power import power
from stretto.measure.race import make_trainer
from stretto.measure.recording import identify
from stretto.measure.statistics import deviation
from stretto.measure.store import ENDED, Run, Store
from stretto.measure.study_summary import tells_with_pairs

if TYPE_CHECKING:
    from stretto.recipes import Arm
    from stretto.train import Trainer
    from stretto.workloads import Workload

SPREAD = 0.07  # standard deviation of a run's log time where no stored runs tell
EFFECTS = np.linspace(0.005, 1.0, 200)  # on log time, that a plan looks for
OF_SEED = {"seed": 0, "replicate": 0}  # what differs between runs of one arm


@dataclass(frozen=True, eq=False)
class StudyPlan:
    """What a study will run, and what is known of it before."""

    workload: Workload
    target: str  # name of one of the workload's
    reference: Arm
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    design: Design  # without the compositions that cannot run
    conflicts: tuple[tuple[str, str], ...]  # methods that want one place
    refused: dict[Composition, str] = field(default_factory=dict)  # tried, and why it cannot run
    stored: dict[Composition, int] = field(default_factory=dict)  # runs that need not be trained again
    costs: dict[Composition, float] = field(default_factory=dict)  # hours of a whole run's training
    evaluating: float = 0.0  # hours of one run's evaluations
    spread: float = SPREAD
    spread_from: int = 0  # stored runs; 0: assumed

    def arm(self, chosen: Composition) -> Arm:
        """The reference with these methods, at the reference's batch size and budget."""
        if not chosen:
            return self.reference
        mine = [method for method in self.methods if method.name in chosen]
        return replace(self.reference, name=" + ".join(chosen), recipe=compose(self.reference.recipe, mine))

    @property
    def compositions(self) -> list[Composition]:
        """What is raced, the reference first; it is raced where the design lacks it, too."""
        return [(), *(one for one in self.design.compositions() if one)]

    @property
    def runs(self) -> int:
        """Of all compositions, without the control's."""
        return len(self.compositions) * len(self.seeds)

    @property
    def missing(self) -> int:
        """Runs that are not stored yet."""
        return sum(len(self.seeds) - self.stored[one] for one in self.compositions)

    def hours(self, chosen: Composition) -> float:
        """Of one run, to the end of its budget: as stored or probed, else the product of what its methods cost."""
        base = self.costs[()]
        ratios = [self.costs.get((name,), base) / base for name in chosen]
        return self.costs.get(chosen, base * math.prod(ratios)) + self.evaluating

    def left(self, chosen: Composition) -> float:
        """Hours at most: missing runs to the end of their budget, the control, and what stored runs' steps cost."""
        stored, seeds = self.stored.get(chosen, 0), len(self.seeds)
        again = min(1, stored)  # measuring the cost of steps again takes as many as one run has
        control = 0 if chosen else seeds
        return self.hours(chosen) * (seeds - stored + again + control)

    @property
    def hours_left(self) -> float:
        """Of all compositions; 0 where everything is stored."""
        return sum(map(self.left, self.compositions)) if self.missing else 0.0


def plan_study(
    workload: Workload,
    target: str,
    reference: Arm,
    methods: Sequence[Method],
    design: Callable[[Sequence[str]], Design],
    seeds: Sequence[int],
    store: Store,
    budget_hours: float | None = None,
) -> StudyPlan:
    """Find out what would be run, what is stored, and what it takes; trains a few steps of each method.

    `design` makes the design from the names of the methods. ValueError for fewer than two methods, one that is
    named twice or is the reference's own, no seeds, a design that tells nothing or needs more than the budget.
    """
    names = _check_methods(reference, methods, seeds)
    plan = StudyPlan(
        workload, target, reference, tuple(methods), tuple(seeds), design(names), _conflicts(methods)
    )
    clash = [set(pair) for pair in plan.conflicts]
    able = plan.design.where(lambda chosen: not any(pair <= set(chosen) for pair in clash))
    plan = replace(plan, design=_with_baseline(able) if len(seeds) > 1 else able)
    plan = _with_costs(plan, store)
    if budget_hours is not None:
        designs.require(plan.design, lambda one: plan.left(one) / len(seeds), budget_hours, len(seeds))
    plan = _without_refused(plan)
    _check_telling(plan)
    return _with_spread(plan, store)


def compose(reference: Recipe, chosen: Sequence[Method]) -> Recipe:
    """The reference with these methods; what it holds that cannot stand beside one of them gives way to it.

    ValueError where two of the chosen methods want one place.
    """
    recipe = Recipe(*chosen)
    return recipe + Recipe(*(held for held in reference.methods if not _clash(held, chosen)))


def replaced(reference: Recipe, method: Method) -> list[str]:
    """Short forms of what a method replaces in the reference."""
    return [short_form(held) for held in reference.methods if _clash(held, [method])]


# ---- the plan in words


class Resolved(NamedTuple):
    """What a plan will tell of one question."""

    question: str  # one of ANSWERS, or "interactions"
    told: int  # how many methods or pairs
    sd: float  # of the worst of them, on log time
    smallest: float | None  # speed-up − 1 that is resolved with probability 0.8; none where above e


def resolvable(plan: StudyPlan) -> list[Resolved]:
    """For each question the precision to expect, from the design's information and the spread of a run."""
    found = _dry_fit(plan)
    k, estimate = len(plan.design.methods), found.estimate
    asked = {name: rows[:, 1 : len(found.model) + 1] for name, rows in designs.contrasts(k).items()}
    asked["interactions"] = np.eye(len(found.model))[k:]
    told = []
    for question, rows in asked.items():
        able = [row for row in rows if estimate.contrast(row) is not None]
        if able:
            sd = plan.spread * max(math.sqrt(row @ estimate.inverse @ row) for row in able)
            told.append(Resolved(question, len(able), sd, _smallest(sd, estimate.degrees)))
    return told


def describe(plan: StudyPlan) -> list[str]:
    """The plan in lines: what, how many, how long, what it will tell."""
    workload, design, reference = plan.workload, plan.design, plan.reference
    goal = f"{workload.metric} {workload.targets[plan.target]:g}"
    lines = [f"study of {workload.name} to {goal}; reference {reference.name}: {reference.recipe}"]
    for method in plan.methods:
        gone = replaced(reference.recipe, method)
        lines.append(short_form(method) + (f" in place of {', '.join(gone)}" if gone else ""))
    lines += design.notes()
    lines += [f"{' + '.join(one)} cannot run: {why}" for one, why in plan.refused.items()]
    done, count = plan.runs - plan.missing, len(plan.compositions)
    lines.append(
        f"{plan.runs} runs ({count} compositions, {len(plan.seeds)} seed{'s' * (len(plan.seeds) != 1)}), "
        f"{done} of them stored already, and {len(plan.seeds)} of the control"
    )
    lines.append(f"one run of the reference {in_words(plan.hours(()))}; all {told(plan.hours_left, count)}")
    origin = f"{plan.spread_from} stored runs" if plan.spread_from else "assumed"
    lines.append(f"standard deviation of a run's log time: {plan.spread:.3f} ({origin})")
    for one in resolvable(plan):
        least = "none below 2.7x" if one.smallest is None else f"{100 * one.smallest:.0f} %"
        what = one.question if one.question == "interactions" else f"effects {one.question}"
        lines.append(f"{what}: sd {one.sd:.3f}, resolved from {least} with power 0.80")
    return lines


# ---- planning


def _check_methods(reference: Arm, methods: Sequence[Method], seeds: Sequence[int]) -> list[str]:
    names = [method.name for method in methods]
    if len(names) < 2:
        raise ValueError(f"a study wants 2 methods or more, not {len(names)}; one against another is a race")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is named twice; a method is one factor of a study")
    if own := next((method for method in methods if method in reference.recipe.methods), None):
        raise ValueError(
            f"{short_form(own)} is in the reference {reference.name} already; there is nothing to study"
        )
    if not seeds:
        raise ValueError("a study wants 1 seed or more")
    return names


def _clash(held: Method, chosen: Sequence[Method]) -> bool:
    try:
        for method in chosen:
            Recipe(held, method)
    except ValueError:
        return True
    return False


def _conflicts(methods: Sequence[Method]) -> tuple[tuple[str, str], ...]:
    return tuple((a.name, b.name) for a, b in combinations(methods, 2) if _clash(a, [b]))


def _with_baseline(design: Design) -> Design:
    """With the reference's own runs, where the design lacks them: they are trained anyway."""
    if design.has_baseline:
        return design
    rows = np.concatenate([np.zeros((1, len(design.methods)), dtype=int), design.rows])
    return replace(design, rows=rows)


def _with_costs(plan: StudyPlan, store: Store) -> StudyPlan:
    """With what is stored, and the hours of a run of the reference, of each method, and of what is stored."""
    found = {one: _stored(plan, one, store) for one in plan.compositions}
    costs = {one: hours for one, runs in found.items() if (hours := _hours_of(runs))}
    needed: list[Composition] = [(), *((method.name,) for method in plan.methods)]
    costs |= _probe(plan, [one for one in needed if one not in costs])
    stored = {one: len(runs) for one, runs in found.items()}
    return replace(plan, costs=costs, stored=stored, evaluating=_evaluating(plan))


def _stored(plan: StudyPlan, chosen: Composition, store: Store) -> list[Run]:
    """The runs of a composition that need not be trained again."""
    arm, value = plan.arm(chosen), plan.workload.targets[plan.target]
    found = (store.find(identify(plan.workload, arm, seed, value)) for seed in plan.seeds)
    return [run for run in found if run and run.record["state"] in ENDED]


def _hours_of(runs: Sequence[Run]) -> float | None:
    """Of one of these runs, had it trained to the end of its budget; none where none was evaluated."""
    last = [rows[-1] for rows in (run.rows() for run in runs) if rows]
    return sum(row["wall"] / row["fraction"] for row in last) / len(last) / 3600 if last else None


def _evaluating(plan: StudyPlan) -> float:
    """Hours of the evaluations of one run of the reference, which are on no clock."""
    return forecast.evaluating(make_trainer(plan.workload, plan.reference, plan.seeds[0]))


def _probe(plan: StudyPlan, chosen: Sequence[Composition]) -> dict[Composition, float]:
    """Hours of one run of each, from a few steps taken in turns; what cannot run alone is left out."""
    trainers: dict[Composition, Trainer] = {}
    for one in chosen:
        try:
            trainer = make_trainer(plan.workload, plan.arm(one), plan.seeds[0])
            trainer.advance(1)
        except ValueError:
            if not one:
                raise
            continue
        trainers[one] = trainer
    return forecast.training(trainers)


def _without_refused(plan: StudyPlan) -> StudyPlan:
    """The design without what fails at its first step."""
    refused = dict(plan.refused)
    for one in plan.compositions:
        if one not in plan.costs:
            try:
                make_trainer(plan.workload, plan.arm(one), plan.seeds[0]).advance(1)
            except ValueError as error:
                refused[one] = str(error)
    return replace(plan, refused=refused, design=plan.design.where(lambda one: one not in refused))


def _check_telling(plan: StudyPlan) -> None:
    """Raise ValueError where the runs would not tell of every method."""
    for name, column in zip(plan.design.methods, plan.design.rows.T):
        if column.min(initial=1) == column.max(initial=0):
            refused = (why for one, why in plan.refused.items() if name in one)
            why = next(refused, "it is in all or none of them")
            raise ValueError(f"{plan.design.name} tells nothing of {name} with what can run: {why}")
    found = _dry_fit(plan)
    if found.estimate.method == "none":
        raise ValueError(
            f"{plan.design.name} with {len(plan.seeds)} seed leaves no spread to judge effects by; "
            "take --seeds 2 or more"
        )
    if not resolvable(plan):
        raise ValueError(
            f"{plan.design.name} can resolve no effect without the compositions that cannot run; take another"
        )


def _dry_fit(plan: StudyPlan) -> effects.Fit:
    """The fit to made-up times: its information and degrees of freedom are those of the real one."""
    design, seeds = plan.design, plan.seeds
    outcomes = [Outcome(seed, 1.0) for _ in design.rows for seed in seeds]
    return effects.fit(
        design.methods, np.repeat(design.rows, len(seeds), axis=0), outcomes, tells_with_pairs(design)
    )


def _smallest(sd: float, degrees: float) -> float | None:
    """The least speed-up − 1 that a contrast with this sd resolves with probability 0.8, up to e − 1."""
    seeds = max(2, round(degrees / 2) + 1)  # two arms of so many seeds have these degrees of freedom
    each = sd * math.sqrt(seeds / 2)
    return next((e for e in map(math.expm1, EFFECTS) if power(e, each, seeds) >= 0.8), None)


def _with_spread(plan: StudyPlan, store: Store) -> StudyPlan:
    """With the spread of the reference's stored runs, of any seed, where three or more reached the target."""
    wanted = identify(plan.workload, plan.reference, 0, plan.workload.targets[plan.target])
    hits = [run.record for run in store.runs(plan.workload.name) if run.record["state"] == "target"]
    alike = [record for record in hits if record["identity"] | OF_SEED == wanted | OF_SEED]
    steps = {record["seed"]: record["crossing"]["at"] for record in alike}
    spread = deviation([math.log(step) for step in steps.values()]) if len(steps) > 2 else 0.0
    return replace(plan, spread=spread, spread_from=len(steps)) if spread else plan
