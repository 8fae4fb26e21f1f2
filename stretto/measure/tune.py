"""Tuning by successive halving, where each run is fully decayed at a budget of its own.

A third of the trials goes on to three times the budget, trained anew: a schedule cut in the middle ranks
learning rates wrongly. The winner is confirmed on fresh seeds, since the best of many is lucky.
Jamieson and Talwalkar 2016, arXiv:1502.07943; E[best of k]: Dodge et al. 2019, arXiv:1909.03004.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stretto.core import nearest
from stretto.measure import single
from stretto.measure.outcomes import Interval
from stretto.measure.race import Standing
from stretto.measure.recording import ALONE, identify
from stretto.measure.samplers import SAMPLERS, Values
from stretto.measure.statistics import mean, paired_interval
from stretto.measure.store import ENDED, SCHEMA, Run, Store, run_id, stopping_clearly
from stretto.train import checkpoint

if TYPE_CHECKING:
    from stretto.core import Recipe
    from stretto.methods._spaces import Space
    from stretto.recipes import Arm
    from stretto.workloads import Workload

TUNING_SEED = 20_000  # the first of a tuning's seeds, which are no race's
FRESH_SEED = 30_000  # the first of a confirmation's
SHORTEST = 10  # steps of the smallest rung, unless rungs are asked for
Watch = Callable[[Sequence[Standing]], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How hard each arm is tuned."""

    trials: int = 9  # the first is the recipe as it stands
    eta: int = 3  # of so many trials one goes on, to so many times the budget
    rungs: int | None = None  # None: as many as the trials and the budget fill
    seeds: int = 1  # of each trial
    confirm_seeds: int = 3  # of the winner, and of the recipe as it stood
    sampler: Literal["random", "optuna"] = "random"

    def __post_init__(self) -> None:
        for name, least in (("trials", 2), ("eta", 2), ("seeds", 1), ("confirm_seeds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"there is no sampler {self.sampler!r}; {nearest(self.sampler, SAMPLERS)}")
        if self.rungs is not None and not 1 <= self.rungs <= self._most_rungs:
            raise ValueError(
                f"rungs is {self.rungs}; {self.trials} trials, of which one in {self.eta} goes on, "
                f"fill 1 to {self._most_rungs}"
            )

    @property
    def _most_rungs(self) -> int:
        return next(k for k in range(1, self.trials + 1) if self.trials < self.eta**k)

    def budgets(self, full: int, batch: int) -> list[int]:
        """Examples of a run on each rung, the last the full budget. ValueError where the first is below a batch."""
        if self.rungs is None:
            filled = [
                k for k in range(1, self._most_rungs + 1) if full // self.eta ** (k - 1) >= SHORTEST * batch
            ]
            count = max(filled, default=1)
        else:
            count = self.rungs
        budgets = [full // self.eta**power for power in reversed(range(count))]
        if budgets[0] < batch:
            raise ValueError(
                f"the first of {count} rungs would have {budgets[0]} examples, less than a batch of {batch}; "
                f"give fewer rungs or a larger budget"
            )
        return budgets


def tune(
    workload: Workload,
    arms: Sequence[Arm],
    drawn: Sequence[Sequence[Space]],
    store: Store,
    effort: Effort,
    *,
    watch: Watch = lambda standings: None,
) -> Record:
    """Tune each arm over its own spaces with the same effort; returns the record, which is stored in `tunings/`.

    What is stored is not trained again. Ctrl-C keeps everything and marks the record as interrupted. ValueError
    for arms of unequal budgets, and where every trial of an arm diverged.
    """
    record = _plan(workload, arms, drawn, effort)
    training = _Training(workload, store, watch)
    with stopping_clearly(store.root):
        try:
            for arm, its in zip(arms, drawn):
                _halve(training, arm, its, effort, record)
            for arm, its in zip(arms, drawn):
                _confirm(training, arm, its, record)
            record["state"] = "done"
        except KeyboardInterrupt:
            record["state"] = "interrupted"
        store.save_tuning(record)
    return record


def _plan(
    workload: Workload, arms: Sequence[Arm], drawn: Sequence[Sequence[Space]], effort: Effort
) -> Record:
    """The record of a tuning that begins, named by all that can change it."""
    full = _shared_budget(workload, arms)
    batch = max(arm.batch or workload.batch for arm in arms)
    planned: Record = {
        "workload": workload.name,
        "metric": workload.metric,
        "falls": workload.falls,
        "fingerprint": workload.fingerprint,
        "sampler": effort.sampler,
        "eta": effort.eta,
        "rungs": effort.budgets(full, batch),
        "trials": effort.trials,
        "seeds": [TUNING_SEED + i for i in range(effort.seeds)],
        "fresh_seeds": [FRESH_SEED + i for i in range(effort.confirm_seeds)],
        "arms": [
            {
                "name": arm.name,
                **_described(arm.recipe),
                "batch": arm.batch or workload.batch,
                "budget": full,
                "spaces": {space.name: str(space) for space in its},
            }
            for arm, its in zip(arms, drawn)
        ],
    }
    identity = run_id(planned)
    for entry in planned["arms"]:
        entry.update(trials=[], winner=None, confirmation=None)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"schema": SCHEMA, "id": identity, "created": now, "state": "running", **planned}


def _shared_budget(workload: Workload, arms: Sequence[Arm]) -> int:
    budgets = {arm.name: arm.budget or workload.budget for arm in arms}
    if len(set(budgets.values())) > 1:
        each = ", ".join(f"{name}: {budget}" for name, budget in budgets.items())
        raise ValueError(
            f"tuned alike, arms have one budget, not {each} (examples); give it with 'RECIPE @ budget=EXAMPLES'"
        )
    return next(iter(budgets.values()))


@dataclass(frozen=True)
class _Training:
    """Trains runs to the end of their budgets, or finds them."""

    workload: Workload
    store: Store
    watch: Watch

    def metrics(self, arm: Arm, seeds: Sequence[int]) -> tuple[list[float | None], list[str]]:
        """The last metric of each seed, none where it diverged, and the names of the runs."""
        values, names = [], []
        for seed in seeds:
            run = self.store.find(identify(self.workload, arm, seed, None))
            if run is None or run.record["state"] not in ENDED:
                run = self._train(arm, seed)
            value = run.rows()[-1][self.workload.metric] if run.record["state"] == "done" else None
            values.append(value)
            names.append(run.id)
        return values, names

    def _train(self, arm: Arm, seed: int) -> Run:
        run = single.train(
            self.workload, arm, self.store.root, execution=ALONE, seed=seed, slices=1, watch=self.watch
        )
        if run.record["state"] == "interrupted":
            raise KeyboardInterrupt
        checkpoint.prune(run.checkpoints, keep=0)  # nobody wants the weights of a trial
        return run


def _halve(training: _Training, arm: Arm, drawn: Sequence[Space], effort: Effort, record: Record) -> None:
    """Successive halving: the arm's trials and its winner, into the record."""
    entry = _entry(record, arm)
    trials, falls = entry["trials"], record["falls"]
    sampler = SAMPLERS[effort.sampler](drawn)

    def train(trial: Record, budget: int) -> None:
        label = f"{arm.name}, trial {trial['number']} of {effort.trials}"
        tried = replace(arm, name=label, recipe=_with(arm.recipe, drawn, trial["values"]), budget=budget)
        metrics, runs = training.metrics(tried, record["seeds"])
        trial["metrics"].append(metrics)
        trial["runs"].append(runs)

    for number in range(1, effort.trials + 1):
        values = _values(arm.recipe, drawn) if number == 1 else sampler.ask()
        trials.append({"number": number, "values": values, "metrics": [], "runs": []})
        train(trials[-1], record["rungs"][0])
        if number > 1:
            sampler.tell(_loss(trials[-1]["metrics"][0], falls))
    racing = list(trials)
    for budget in record["rungs"][1:]:
        racing = _ranked(racing, falls)[: len(racing) // effort.eta]
        for trial in racing:
            train(trial, budget)
    best = _ranked(racing, falls)[0]
    if math.isinf(_loss(best["metrics"][-1], falls)):
        raise ValueError(f"every trial of {arm.name} diverged; give --space with smaller learning rates")
    entry["winner"] = {
        "number": best["number"],
        "values": best["values"],
        "metrics": best["metrics"][-1],
        **_described(_with(arm.recipe, drawn, best["values"])),
    }


def _with(recipe: Recipe, drawn: Sequence[Space], values: Values) -> Recipe:
    """The recipe with these values of its spaces."""
    for method in {space.method for space in drawn}:
        changed = {space.field: values[space.name] for space in drawn if space.method is method}
        recipe = recipe.replace(method, **changed)
    return recipe


def _values(recipe: Recipe, drawn: Sequence[Space]) -> Values:
    """What the recipe has in the place of each space."""
    return {
        space.name: next(getattr(one, space.field) for one in recipe.methods if isinstance(one, space.method))
        for space in drawn
    }


def _described(recipe: Recipe) -> Record:
    return {"short": str(recipe), "recipe": recipe.to_json(), "hash": recipe.hash}


def _confirm(training: _Training, arm: Arm, drawn: Sequence[Space], record: Record) -> None:
    """The winner and the recipe as it stood, at the full budget on seeds that chose neither."""
    entry = _entry(record, arm)
    full, seeds = replace(arm, budget=entry["budget"]), record["fresh_seeds"]
    winner = _with(arm.recipe, drawn, entry["winner"]["values"])
    found, runs = training.metrics(replace(full, name=f"{arm.name}, tuned", recipe=winner), seeds)
    before, runs_before = training.metrics(full, seeds)
    entry["confirmation"] = {"winner": found, "given": before, "runs": [runs, runs_before]}


def _entry(record: Record, arm: Arm) -> Record:
    entry: Record = next(entry for entry in record["arms"] if entry["name"] == arm.name)
    return entry


def _ranked(trials: Sequence[Record], falls: bool) -> list[Record]:
    """The best at the last budget of each first."""
    return sorted(trials, key=lambda trial: _loss(trial["metrics"][-1], falls))


def _loss(metrics: Sequence[float | None], falls: bool) -> float:
    """The mean over seeds, less is better; infinite where one diverged."""
    known = [value for value in metrics if value is not None]
    if len(known) < len(metrics):
        return math.inf
    return mean(known) * (1 if falls else -1)


# ---- what a record tells


def path(store: Store, record: Record) -> Path:
    """Where a record lies."""
    return store.root / "tunings" / f"{record['id']}.json"


def trials(record: Record) -> dict[str, int]:
    """How many trials each arm had."""
    return {entry["name"]: len(entry["trials"]) for entry in record["arms"]}


def examples(record: Record) -> dict[str, int]:
    """How many examples each arm's trials were trained on, confirmation left out."""
    return {
        entry["name"]: sum(
            budget * len(seeds)
            for trial in entry["trials"]
            for budget, seeds in zip(record["rungs"], trial["metrics"])
        )
        for entry in record["arms"]
    }


def edges(record: Record) -> list[str]:
    """The tuned values beyond which nothing was tried on one side, a sentence each: the optimum may lie there."""
    found = []
    for entry in record["arms"]:
        for name, value in (entry["winner"] or {"values": {}})["values"].items():
            tried = [trial["values"][name] for trial in entry["trials"]]
            if not all(isinstance(one, int | float) for one in tried) or min(tried) == max(tried):
                continue
            if value in (min(tried), max(tried)):
                end = "smallest" if value == min(tried) else "largest"
                found.append(
                    f"{entry['name']}: its best {name}, {value:g}, is the {end} tried "
                    f"({min(tried):g} to {max(tried):g}), and a better one may lie beyond."
                )
    return found


def expected_best(values: Sequence[float], k: int, falls: bool = True) -> float:
    """Mean of the best of k trials drawn, with replacement, from these: what tuning with k trials would have given.

    Dodge et al. 2019, equation 7. ValueError for no values or k below 1.
    """
    if not values or k < 1:
        raise ValueError(f"the best of {k} among {len(values)} trials is not defined; both must be 1 or more")
    n = len(values)
    worst_first = sorted(values, reverse=falls)
    return math.fsum(v * ((i / n) ** k - ((i - 1) / n) ** k) for i, v in enumerate(worst_first, 1))


def curve(record: Record, entry: Record) -> list[float]:
    """E[best of k], k = 1 and up, of an arm's drawn trials at the smallest budget.

    A trial that diverged counts as the worst that did not; empty where all did.
    """
    falls = record["falls"]
    losses = [_loss(trial["metrics"][0], falls) for trial in entry["trials"][1:]]
    known = [loss for loss in losses if math.isfinite(loss)]
    if not known:
        return []
    values = [min(loss, max(known)) * (1 if falls else -1) for loss in losses]
    return [expected_best(values, k, falls) for k in range(1, len(values) + 1)]


def gain(record: Record, better: Sequence[float | None], worse: Sequence[float | None]) -> Interval | None:
    """By how much the first is better, paired by seed, in the metric's unit; none where a run diverged or n < 2."""
    first, second = ([value for value in metrics if value is not None] for metrics in (better, worse))
    if min(len(first), len(second)) < max(2, len(better), len(worse)):
        return None
    return paired_interval(second, first) if record["falls"] else paired_interval(first, second)
