"""Studies: a designed set of compositions of methods, raced against the reference and against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from stretto.core import short_form
from stretto.measure import executors
from stretto.measure.designs import present
from stretto.measure.race import Standing, race
from stretto.measure.store import Store, stopping_clearly
from stretto.measure.study_plan import StudyPlan

Executor = Literal["interleaved", "processes", "ray"]


def run(
    plan: StudyPlan,
    store: Store,
    *,
    executor: Executor = "interleaved",
    workers: int | None = None,
    footprints: bool = True,
    watch: Callable[[Sequence[Standing]], None] = lambda standings: None,
) -> dict[str, Any]:
    """Race the compositions and return the study as it is stored; an equal study that was stopped goes on.

    Executors other than "interleaved" train the missing runs first, one a task, for their steps; what a step costs
    is then measured here. Ctrl-C keeps everything and marks the study as interrupted. ValueError, with all that
    was stored kept, for a disk that is full and for runs whose worker died again and again.
    """
    study = _record(plan, executor)
    study |= _asked_before(store, study)
    with stopping_clearly(store.root):
        study["id"] = store.save_study({**study, "state": "running"})
        arms = [plan.arm(one) for one in plan.compositions]
        try:
            if executor != "interleaved":
                value = plan.workload.targets[plan.target]
                executors.fill(plan.workload, arms, store, plan.seeds, value, executor, workers)
        except KeyboardInterrupt:
            store.save_study({**study, "state": "interrupted"})
            return store.study(study["id"])
        race_id = race(
            plan.workload,
            arms,
            store,
            target=plan.target,
            seeds=plan.seeds,
            footprints=footprints,
            watch=watch,
        )
        state = "interrupted" if store.race(race_id)["interrupted"] else "done"
        store.save_study({**study, "state": state, "race": race_id})
    return store.study(study["id"])


def _record(plan: StudyPlan, executor: Executor) -> dict[str, Any]:
    reference, design = plan.reference, plan.design
    return {
        "workload": plan.workload.name,
        "fingerprint": plan.workload.fingerprint,
        "target_name": plan.target,
        "reference": {
            "name": reference.name,
            "methods": reference.recipe.to_json()["methods"],
            "batch": reference.batch or plan.workload.batch,
            "budget": reference.budget or plan.workload.budget,
        },
        "methods": [short_form(method) for method in plan.methods],
        "design": {
            "name": design.name,
            "rows": design.rows.tolist(),
            "words": [list(word) for word in design.words],
            "dropped": [list(one) for one in design.dropped],
            "conflicts": [list(pair) for pair in plan.conflicts],
        },
        "arms": [plan.arm(present(design.methods, row)).name for row in design.rows],
        "seeds": list(plan.seeds),
        "eval_every": plan.workload.eval_every,
        "smooth": plan.workload.smooth,
        "executor": executor,
        "race": None,
    }


def _asked_before(store: Store, study: dict[str, Any]) -> dict[str, Any]:
    """Id, date, latest race and confirmation of the stored study that asks the same, if there is one."""
    for name in reversed(store.studies()):
        try:
            stored = store.study(name)
        except ValueError:  # of another schema, or unreadable: not this one
            continue
        if all(stored.get(key) == study[key] for key in study if key not in ("executor", "race")):
            return {key: stored[key] for key in ("id", "created", "race", "confirmation") if key in stored}
    return {}
