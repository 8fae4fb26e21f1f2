"""`stretto quality`: how much sooner recipes reach equal quality, from trainings at several budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from stretto.commands.asking import declined

if TYPE_CHECKING:
    from stretto.measure.quality_plan import QualityPlan
    from stretto.measure.store import Store


@dataclass(frozen=True)
class Quality:
    """How much sooner recipes reach equal quality: each trained to the end of several budgets. Plans first, then asks.

    This is the comparison for schedules that end with their budget, and it needs no target.
    """

    workload: Positional[str]
    """Name of a workload."""
    recipes: Annotated[tuple[str, ...], arg(metavar="RECIPE ...")] = ()
    """Two or more, as `stretto race` takes them; the first is the baseline. Default: the workload's own."""
    budgets: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Shares of each recipe's own budget, four or more."""
    seeds: int = 3
    """How many seeds, two or more, the same for all recipes and budgets."""
    yes: bool = False
    """Start without asking."""
    out: Path = Path("runs")
    """Folder of the runs; what is stored there is not trained again, and a stopped comparison goes on."""

    def run(self) -> int:
        """Print the plan; once agreed, train and print what it showed. Exit code 2 where nobody can be asked."""
        from stretto.measure import live, quality_plan

        plan, store = self.plan()
        print("\n".join(quality_plan.describe(plan)), flush=True)
        if (code := declined(self.yes)) is not None:
            return code
        with live.shown(plan.workload.metric, None, plan.workload.falls) as watch:
            found = quality_plan.run(plan, store, watch=watch)
        return _conclude(store, found)

    def plan(self) -> tuple[QualityPlan, Store]:
        """What was asked for, checked, and the folder that it goes to."""
        from stretto import recipes, workloads
        from stretto.measure.quality_plan import plan_quality
        from stretto.measure.store import Store

        if unfit := next((share for share in self.budgets if not 0 < share < math.inf), None):
            raise ValueError(f"--budgets holds {unfit:g}; a share of a recipe's budget is above 0")
        workload = workloads.find(self.workload)
        target = next(iter(workload.targets))
        if self.recipes:
            arms = [recipes.arm(text, workload.name, target) for text in self.recipes]
        else:
            arms = list(recipes.raced(workload.name, target).values())
        store = Store(self.out)
        return plan_quality(workload, arms, self.budgets, range(self.seeds), store), store


def _conclude(store: Store, record: dict[str, Any]) -> int:
    """Print what a comparison showed: the answer, the tables, the caveats, and where its page lies."""
    from stretto.measure import report, sources
    from stretto.measure.equal import equal_table

    part = sources.quality_part(store, record["id"])
    assert part.equal
    print("\n".join([*part.equal.sentences, "", equal_table(part.equal), ""]))
    for warning in part.summary.warnings:
        print(f"note: {warning}")
    page = part.place.with_name(f"{part.place.name}.html")
    print(f"report: {report.write_text(report.page([part]), page)}")
    print(f"quality: {store.root / 'qualities' / record['id']}.json")
    if record["state"] == "interrupted":
        print("interrupted: everything measured so far is kept, and the same command goes on from there")
        return 130
    return 0
