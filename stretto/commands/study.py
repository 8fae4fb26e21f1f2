"""`stretto study`: which methods help, alone and together, from a designed set of runs that is planned first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from stretto.commands.asking import declined

if TYPE_CHECKING:
    from stretto.measure.designs import Design
    from stretto.measure.store import Store
    from stretto.measure.study_plan import StudyPlan

RESOLUTION = 5  # methods and pairs clear of each other


@dataclass(frozen=True)
class Study:
    """Which methods help, alone and together: a designed set of runs. Plans first, then asks."""

    workload: Positional[str]
    """Name of a workload."""
    methods: Annotated[tuple[str, ...], arg(metavar="METHOD ...")] = ()
    """Short forms such as muon:lr=0.03, two or more. A method that the reference has another of replaces it."""
    design: Literal["alone", "leave-one-out", "factorial", "fraction", "screen"] = "fraction"
    """Which compositions: each method alone, each left out, all, a fraction of all, or a Plackett-Burman screen."""
    resolution: int | None = None
    """Of a fraction: 5 tells methods and pairs, 4 methods, 3 methods if no two interact. Default: 5."""
    seeds: int = 2
    """How many seeds, the same for all compositions."""
    budget_hours: float | None = None
    """Refuse a design that may take longer, and name the nearest smaller one."""
    base: str | None = None
    """The reference, as `stretto race` takes it. Default: the first of the workload's own."""
    target: str | None = None
    """Which of the workload's targets. Default: its first."""
    evaluations: int | None = None
    """How many a run, evenly over its budget: more of them tell its time more finely. Default: the workload's."""
    smooth: int = 1
    """Hold the median of so many evaluations against the target, where single ones are noisy."""
    executor: Literal["interleaved", "processes", "ray"] = "interleaved"
    """Train all here in turns, or first in processes or on a Ray cluster, one run a task."""
    workers: int | None = None
    """Runs at a time for the other executors. Default: what fits."""
    yes: bool = False
    """Start without asking."""
    out: Path = Path("runs")
    """Folder of the runs; what is stored there is not trained again, and a stopped study goes on."""

    def run(self) -> int:
        """Print the plan; once agreed, run it and print what it showed. Exit code 2 where nobody can be asked."""
        from stretto.measure import live, study, study_plan

        plan, store = self.plan()
        print("\n".join(study_plan.describe(plan)), flush=True)
        if (code := declined(self.yes)) is not None:
            return code
        workload = plan.workload
        with live.shown(workload.metric, workload.targets[plan.target], workload.falls) as watch:
            found = study.run(plan, store, executor=self.executor, workers=self.workers, watch=watch)
        return _conclude(store, found)

    def plan(self) -> tuple[StudyPlan, Store]:
        """What was asked for, checked, and the folder that it goes to."""
        from stretto import methods, recipes, workloads
        from stretto.core import nearest
        from stretto.measure import study_plan
        from stretto.measure.store import Store

        for name in ("seeds", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be 1 or more")
        if self.budget_hours is not None and not self.budget_hours > 0:
            raise ValueError(f"--budget-hours is {self.budget_hours:g}; it must be above 0")
        design = self._design()
        chosen = list(chain.from_iterable(methods.parse(text).methods for text in self.methods))
        workload = workloads.find(self.workload, self.evaluations, self.smooth)
        target = self.target or next(iter(workload.targets))
        if target not in workload.targets:
            raise ValueError(f"{workload.name} has no target {target!r}; {nearest(target, workload.targets)}")
        raced = recipes.raced(workload.name, target)
        reference = recipes.arm(self.base or next(iter(raced)), workload.name, target)
        store, seeds = Store(self.out), range(self.seeds)
        plan = study_plan.plan_study(
            workload, target, reference, chosen, design, seeds, store, self.budget_hours
        )
        return plan, store

    def _design(self) -> Callable[[Sequence[str]], Design]:
        from stretto.measure import designs

        if self.design == "fraction":
            return lambda names: designs.fraction(names, resolution=self.resolution or RESOLUTION)
        if self.resolution is not None:
            raise ValueError(f"--resolution belongs to --design fraction, not to {self.design}")
        makers: dict[str, Callable[[Sequence[str]], Design]] = {
            "alone": designs.alone, "leave-one-out": designs.leave_one_out, "factorial": designs.factorial,
            "screen": designs.screen,
        }  # fmt: skip
        return makers[self.design]


def _conclude(store: Store, study: dict[str, Any]) -> int:
    """Print what a study showed: the answer, the tables, the caveats, and where its page lies."""
    from stretto.measure import report, sources
    from stretto.measure.study_summary import study_table, summarise_study

    if study["race"] is not None:
        found = summarise_study(store, study)
        print("\n".join([*found.sentences, "", study_table(found), ""]))
        for warning in found.race.warnings:
            print(f"note: {warning}")
        part = sources.study_part(store, study["id"])
        page = part.place.with_name(f"{part.place.name}.html")
        print(f"report: {report.write_text(report.page([part]), page)}")
    print(f"study: {store.root / 'studies' / study['id']}.json")
    if study["state"] == "interrupted":
        print("interrupted: everything measured so far is kept, and the same command goes on from there")
        return 130
    return 0
