"""`stretto recommend`: the recipe that a study speaks for, confirmed on fresh seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from stretto.measure.study_summary import StudySummary
    from stretto.recipes import Arm


@dataclass(frozen=True)
class Recommend:
    """The best composition of a study as a recipe file, raced against the reference on fresh seeds."""

    study: Positional[str]
    """Id of the study."""
    confirm_seeds: int = 3
    """How many fresh seeds; 0 does not race."""
    to: Path | None = None
    """The recipe file. Default: recipes/STUDY.json in the folder of the runs."""
    out: Path = Path("runs")
    """Folder of the runs."""

    def run(self) -> int:
        """Say what to use, write it, race it."""
        from stretto.measure import recommend
        from stretto.measure.store import Store

        if self.confirm_seeds < 0:
            raise ValueError(f"--confirm-seeds is {self.confirm_seeds}; it must be 0 or more")
        store = Store(self.out, write=False)
        summary = recommend.recommend(store, self.study)
        for sentence in recommend.sentences(summary):
            print(sentence)
        reference, arm = arms(summary)
        path = self.to or store.root / "recipes" / f"{self.study}.json"
        recommend.write_file(arm, path)
        print(f"recipe: {path}")
        if arm is reference:
            print("there is nothing to confirm: the recipe is the reference")
            return 0
        if not self.confirm_seeds:
            print("not confirmed: --confirm-seeds is 0")
            return 0
        return self._confirm(summary, reference, arm)

    def _confirm(self, summary: StudySummary, reference: Arm, arm: Arm) -> int:
        from stretto import workloads
        from stretto.measure import live, recommend
        from stretto.measure.store import Store
        from stretto.measure.summary import summarise

        study, store = summary.study, Store(self.out)
        workload = workloads.find(study["workload"])
        workload.eval_every = study.get("eval_every", workload.eval_every)
        workload.smooth = study.get("smooth", 1)
        target = workload.targets[study["target_name"]]
        with live.shown(workload.metric, target, workload.falls) as watch:
            found = recommend.confirm(
                store, workload, summary, reference, arm, self.confirm_seeds, watch=watch
            )
        if found is None:
            print("interrupted: everything trained so far is kept, and the same command goes on from there")
            return 130
        print(found["sentence"])
        for warning in summarise(store, store.race(found["race"])).warnings:
            print(f"note: {warning}")
        print(f"race: {store.root / 'races' / found['race']}.json")
        return 0


def arms(summary: StudySummary) -> tuple[Arm, Arm]:
    """The study's reference, and the best composition; twice the reference where nothing is worth adding."""
    from stretto import methods
    from stretto.measure.study_plan import compose
    from stretto.recipes import Arm

    held, best = summary.study["reference"], summary.best
    assert best
    recipe = methods.from_json({"methods": held["methods"]})
    reference = Arm(held["name"], recipe, held["batch"], held["budget"])
    named = zip(summary.methods, summary.study["methods"])
    chosen = [methods.parse(short).methods[0] for name, short in named if name in best.composition]
    if not chosen:
        return reference, reference
    return reference, replace(reference, name=" + ".join(best.composition), recipe=compose(recipe, chosen))
