"""`stretto tune`: fields of a recipe, and as hard those of the recipe it is to be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stretto.measure.outcomes import Interval
    from stretto.recipes import Arm
    from stretto.workloads import Workload


@dataclass(frozen=True)
class Tune:
    """Tune a recipe by successive halving, each run fully decayed, and confirm the winner on fresh seeds."""

    workload: Positional[str]
    """Name of a workload."""
    recipe: str = "baseline"
    """A name, a short form or a JSON file, perhaps followed by "@ batch=8 budget=400" (examples)."""
    space: Annotated[tuple[str, ...], arg(metavar="SPACE ...")] = ()
    """What to tune: "muon.lr=log:0.005..0.08", "muon.momentum=linear:0.8..0.98", "muon.coefficients=jordan|polar",
    or "muon.lr" for the range it declares. Default: all that the recipe's methods declare."""
    against: str | None = None
    """Another recipe, tuned with as many trials at the same budgets."""
    trials: int = 9
    """How many trials each recipe has; the first is the recipe as it stands."""
    eta: int = 3
    """Of so many trials one goes on, trained anew at so many times the budget."""
    rungs: int | None = None
    """How many budgets. Default: as many as the trials and the budget fill."""
    seeds: int = 1
    """Seeds of each trial."""
    confirm_seeds: int = 3
    """Fresh seeds of the winner, and of the recipe as it stands."""
    sampler: Literal["random", "optuna"] = "random"
    """Draw evenly (Halton's sequence), or near what did well (TPE; wants the extra `tune`)."""
    out: Path = Path("runs")
    """Folder of the runs; what is stored there is not trained again."""

    def run(self) -> int:
        """Tune, print what was found."""
        from stretto import workloads
        from stretto.measure import live, tune
        from stretto.measure.store import Store
        from stretto.methods import _spaces

        workload = workloads.find(self.workload)
        arms, asked = self._arms(workload), [_spaces.parse(text) for text in self.space]
        drawn = _spaces.choose([arm.recipe for arm in arms], asked)
        effort = tune.Effort(self.trials, self.eta, self.rungs, self.seeds, self.confirm_seeds, self.sampler)
        store = Store(self.out)
        with live.shown(workload.metric, None, workload.falls) as watch:
            record = tune.tune(workload, arms, drawn, store, effort, watch=watch)
        for line in told(record):
            print(line)
        print(f"record: {tune.path(store, record)}")
        if record["state"] == "interrupted":
            print("interrupted: everything trained so far is kept, and the same command goes on from there")
            return 130
        return 0

    def _arms(self, workload: Workload) -> list[Arm]:
        from stretto import recipes

        target = next(iter(workload.targets))
        texts = [self.recipe] if self.against is None else [self.recipe, self.against]
        arms = [recipes.arm(text, workload.name, target) for text in texts]
        if len({arm.name for arm in arms}) < len(arms):
            raise ValueError(f"--recipe and --against are both {arms[0].name!r}; name two recipes")
        return arms


def told(record: dict[str, Any]) -> list[str]:
    """What a tuning found, arm by arm, and what to beware of."""
    from stretto.measure import tune

    count, spent = tune.trials(record), tune.examples(record)
    budgets = ", ".join(map(str, record["rungs"]))
    lines = []
    for entry in record["arms"]:
        name = entry["name"]
        lines.append(
            f"{name}: {count[name]} trials at budgets of {budgets} examples, {spent[name]} examples in all"
        )
        if curve := tune.curve(record, entry):
            shown = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < len(curve)] + [len(curve)]
            best = ", ".join(f"{k}: {curve[k - 1]:.4g}" for k in shown)
            lines.append(f"  expected {record['metric']} of the best of so many trials, first budget: {best}")
        if entry["winner"]:
            lines.append(f"  best: {entry['winner']['short']}")
            values = ", ".join(
                f"{field} {_value(value)}" for field, value in entry["winner"]["values"].items()
            )
            lines.append(f"  trial {entry['winner']['number']} of {count[name]}: {values}")
        if entry["confirmation"]:
            lines += [f"  {line}" for line in _confirmed(record, entry)]
    if len(record["arms"]) == 2 and all(entry["confirmation"] for entry in record["arms"]):
        lines.append(_between(record))
    return lines + [f"note: {edge}" for edge in tune.edges(record)]


def _confirmed(record: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    from stretto.measure import tune

    metric, found = record["metric"], entry["confirmation"]
    seeds = f"{len(record['fresh_seeds'])} fresh seed{'s' * (len(record['fresh_seeds']) != 1)}"
    lines = [f"on {seeds}: {metric} {_mean(found['winner'])}, as it stood {_mean(found['given'])}"]
    if entry["winner"]["number"] == 1:
        return [*lines, "nothing tried was better than the recipe as it stands"]
    if gain := tune.gain(record, found["winner"], found["given"]):
        lines.append(f"tuning gained {_resolved(gain)} of {metric}")
    return lines


def _between(record: dict[str, Any]) -> str:
    from stretto.measure import tune

    first, second = record["arms"]
    gain = tune.gain(record, first["confirmation"]["winner"], second["confirmation"]["winner"])
    if gain is None:
        return (
            f"{first['name']} and {second['name']}, both tuned, are not compared: a run diverged, or one seed"
        )
    return (
        f"{first['name']} gains {_resolved(gain)} of {record['metric']} over {second['name']}, "
        f"both tuned, at {record['rungs'][-1]} examples"
    )


def _resolved(gain: Interval) -> str:
    known = "better" if gain.low > 0 else "worse" if gain.high < 0 else "not resolved"
    return f"{gain.estimate:.3g} [{gain.low:.3g}, {gain.high:.3g}] ({known})"


def _mean(metrics: Sequence[float | None]) -> str:
    known = [value for value in metrics if value is not None]
    lost = f", {len(metrics) - len(known)} diverged" * (len(known) < len(metrics))
    return f"{sum(known) / len(known):.4g}{lost}" if known else "none: all diverged"


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
