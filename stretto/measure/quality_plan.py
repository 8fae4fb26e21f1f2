"""Comparisons at equal quality: each recipe trained fully decayed at several budgets, planned first, then raced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stretto.measure import forecast
from stretto.measure.forecast import in_words
from stretto.measure.quality import FEWEST
from stretto.measure.race import Standing, make_trainer, race
from stretto.measure.recording import identify
from stretto.measure.store import ENDED, Store, stopping_clearly

if TYPE_CHECKING:
    from stretto.recipes import Arm
    from stretto.workloads import Workload


@dataclass(frozen=True, eq=False)
class QualityPlan:
    """What a comparison will run, and what is known of it before."""

    workload: Workload
    recipes: tuple[Arm, ...]  # the first is the baseline
    shares: tuple[float, ...]  # of each recipe's budget, the smallest first
    seeds: tuple[int, ...]
    stored: tuple[int, ...] = ()  # runs of each arm that need not be trained again, the control's last
    costs: tuple[float, ...] = ()  # of each recipe, hours of training on one example
    evaluating: float = 0.0  # hours of one run's evaluations

    def arm(self, recipe: Arm, share: float) -> Arm:
        """A recipe at a share of its budget, in whole steps."""
        batch = recipe.batch or self.workload.batch
        steps = max(1, round(share * (recipe.budget or self.workload.budget) / batch))
        return replace(recipe, name=f"{recipe.name} at {100 * share:g} %", budget=steps * batch)

    @property
    def arms(self) -> list[Arm]:
        """What is raced: the baseline's budgets, then those of each other."""
        return [self.arm(recipe, share) for recipe in self.recipes for share in self.shares]

    @property
    def runs(self) -> int:
        """Of all arms, without the control's."""
        return len(self.arms) * len(self.seeds)

    @property
    def missing(self) -> int:
        """Runs that are not stored yet, without the control's."""
        return self.runs - sum(self.stored[:-1])

    def hours(self, recipe: int, share: float) -> float:
        """Of one run."""
        return self.costs[recipe] * (self.arm(self.recipes[recipe], share).budget or 0) + self.evaluating

    @property
    def hours_left(self) -> float:
        """Of the runs that are missing, and of measuring again what stored runs' steps cost."""
        if not self.missing:
            return 0.0
        whole = [self.hours(recipe, share) for recipe in range(len(self.recipes)) for share in self.shares]
        seeds = len(self.seeds)
        return sum(
            hours * (seeds - stored + min(1, stored))
            for hours, stored in zip([*whole, whole[0]], self.stored)
        )


def plan_quality(
    workload: Workload, recipes: Sequence[Arm], shares: Sequence[float], seeds: Sequence[int], store: Store
) -> QualityPlan:
    """Find out what would be run, what is stored, and what it takes; trains a few steps of each recipe.

    ValueError for fewer than 2 recipes, 4 shares or 2 seeds, and for arms that are equal.
    """
    plan = QualityPlan(workload, tuple(recipes), tuple(sorted(shares)), tuple(seeds))
    _check(plan)
    trainers = {recipe.name: make_trainer(workload, recipe, plan.seeds[0]) for recipe in recipes}
    for trainer in trainers.values():
        trainer.advance(1)
    hours = forecast.training(trainers)
    costs = tuple(hours[recipe.name] / (recipe.budget or workload.budget) for recipe in recipes)
    evaluating = forecast.evaluating(trainers[recipes[0].name])
    return replace(plan, stored=_stored(plan, store), costs=costs, evaluating=evaluating)


def _check(plan: QualityPlan) -> None:
    if len(plan.recipes) < 2:
        raise ValueError(
            f"equal quality wants 2 recipes or more, the baseline first, not {len(plan.recipes)}"
        )
    if len(plan.shares) < FEWEST:
        shown = ", ".join(f"{share:g}" for share in plan.shares)
        raise ValueError(f"the baseline's curve wants {FEWEST} budgets or more, not {shown}")
    if len(plan.seeds) < 2:
        raise ValueError(f"an interval wants 2 seeds or more, not {len(plan.seeds)}")
    seen: dict[tuple[str, int | None, int | None], str] = {}
    for arm in plan.arms:
        key = (arm.recipe.hash, arm.batch or plan.workload.batch, arm.budget)
        if key in seen:
            raise ValueError(f"{seen[key]} and {arm.name} are the same training; leave one out")
        seen[key] = arm.name
    names = [recipe.name for recipe in plan.recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two recipes are named {twice!r}; name one differently in its file")


def _stored(plan: QualityPlan, store: Store) -> tuple[int, ...]:
    """How many runs of each arm, and of the control, need not be trained again."""
    entries = [*((arm, 0) for arm in plan.arms), (plan.arms[0], 1)]
    found = (
        [store.find(identify(plan.workload, arm, seed, None, replicate=replicate)) for seed in plan.seeds]
        for arm, replicate in entries
    )
    return tuple(sum(run is not None and run.record["state"] in ENDED for run in runs) for runs in found)


def describe(plan: QualityPlan) -> list[str]:
    """The plan in lines: what, how many, how long."""
    workload = plan.workload
    shares = ", ".join(f"{100 * share:g}" for share in plan.shares)
    lines = [
        f"equal quality on {workload.name}: {workload.metric} at {shares} % of each recipe's budget, "
        f"against {plan.recipes[0].name}"
    ]
    for recipe in plan.recipes:
        lines.append(f"{recipe.name}: {recipe.recipe}; budget {recipe.budget or workload.budget} examples")
    lines.append(
        f"{plan.runs} runs ({len(plan.recipes)} recipes, {len(plan.shares)} budgets, {len(plan.seeds)} seeds), "
        f"{plan.runs - plan.missing} of them stored already, and {len(plan.seeds)} of the control"
    )
    lines.append(
        f"one run of {plan.recipes[0].name} {in_words(plan.hours(0, 1.0))}; "
        f"all {forecast.told(plan.hours_left, len(plan.recipes))}"
    )
    return lines


def run(
    plan: QualityPlan,
    store: Store,
    *,
    footprints: bool = True,
    watch: Callable[[Sequence[Standing]], None] = lambda standings: None,
) -> dict[str, Any]:
    """Train all arms in turns and return the comparison as it is stored; an equal one that was stopped goes on.

    Ctrl-C keeps everything and marks it as interrupted. ValueError, with all that was stored kept, for a full disk.
    """
    record = _record(plan)
    record |= _asked_before(store, record)
    with stopping_clearly(store.root):
        record["id"] = store.save_quality({**record, "state": "running"})
        race_id = race(
            plan.workload, plan.arms, store, target=None, seeds=plan.seeds, footprints=footprints, watch=watch
        )
        state = "interrupted" if store.race(race_id)["interrupted"] else "done"
        store.save_quality({**record, "state": state, "race": race_id})
    return store.quality(record["id"])


def _record(plan: QualityPlan) -> dict[str, Any]:
    return {
        "workload": plan.workload.name,
        "fingerprint": plan.workload.fingerprint,
        "base": plan.recipes[0].name,
        "recipes": [{"name": one.name, "methods": one.recipe.to_json()["methods"]} for one in plan.recipes],
        "arms": [
            {"name": plan.arm(recipe, share).name, "recipe": recipe.name, "share": share}
            for recipe in plan.recipes
            for share in plan.shares
        ],
        "budgets": [arm.budget for arm in plan.arms],
        "seeds": list(plan.seeds),
        "race": None,
    }


def _asked_before(store: Store, record: dict[str, Any]) -> dict[str, Any]:
    """Id, date and latest race of the stored comparison that asks the same, if there is one."""
    for name in reversed(store.qualities()):
        try:
            stored = store.quality(name)
        except ValueError:  # of another schema, or unreadable: not this one
            continue
        if all(stored.get(key) == record[key] for key in record if key != "race"):
            return {key: stored[key] for key in ("id", "created", "race")}
    return {}
