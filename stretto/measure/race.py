"""Interleaved contests: recipes advance in alternating blocks, each on its own clock, until the target.

Seconds compare inside one sitting only (one call of `race`). A stored run brings its steps; what a step of it
costs is then measured again beside the new runs.
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from stretto.core import stable_hash
from stretto.measure.clock import Stopwatch
from stretto.measure.footprint import UNKNOWN, Footprint, footprint
from stretto.measure.outcomes import find_crossing, smoothed
from stretto.measure.recording import clock, evaluation, first_record, identify, marks, seconds
from stretto.measure.store import ENDED, Run, Store
from stretto.train import Trainer, checkpoint

if TYPE_CHECKING:
    from stretto.recipes import Arm
    from stretto.workloads import Workload

PROBE_BLOCKS = 40  # for each stored run, in which the cost of its steps is measured again
BLOCKS = 80  # of a run, or a few more: the finer, the less a burst of noise falls on one contestant alone
CHECKPOINT_SECONDS = 10.0  # between checkpoints of one run
Control = Literal["same", "fresh", "off"]


class Standing(NamedTuple):
    """Where one contestant is, for whoever watches."""

    label: str
    seed: int
    fraction: float  # of its budget
    loss: float  # of the last training batch
    metric: float | None  # at the last evaluation
    wall: float  # seconds on its clock
    state: str


@dataclass(eq=False)
class Entry:
    """An arm in a race: its label, and one run a seed."""

    arm: Arm
    label: str
    seeds: tuple[int, ...]
    replicate: int = 0  # 1 for a control on the same seeds: equal in all but the clock
    runs: dict[int, Run] = field(default_factory=dict)  # by seed
    costs: dict[int, tuple[float, float]] = field(default_factory=dict)  # by seed: wall and CPU seconds of a
    # step, measured again in this sitting
    parameters: int | None = None
    footprint: Footprint = UNKNOWN


class Contestant:
    """One run in the making: a trainer, its clock, and its folder."""

    def __init__(self, workload: Workload, entry: Entry, seed: int, run: Run, target: float | None) -> None:
        self.workload, self.entry, self.seed, self.run, self.target = workload, entry, seed, run, target
        self.trainer = make_trainer(workload, entry.arm, seed)
        self.watch = Stopwatch()
        self.state = "running"
        self._saved = time.monotonic()
        self._resume()
        steps = self.trainer.plan.steps
        self.rows = [row for row in run.rows() if row["step"] <= self.trainer.step]
        self.marks = marks(self.trainer)
        evaluations = max(1, round(1 / workload.eval_every))
        blocks = evaluations * max(1, round(BLOCKS / evaluations))
        self.stops = sorted({math.ceil(steps * k / blocks) for k in range(1, blocks + 1)})

    def _resume(self) -> None:
        if found := checkpoint.find(self.run.checkpoints):
            self.watch = Stopwatch(**checkpoint.load(self.trainer, found)["watch"])
            self.run.update(sitting=None, state="running")  # its seconds are of two sittings

    def block(self) -> None:
        """Train to the next stop, on the clock; where an evaluation is due, evaluate and record, off it."""
        trainer = self.trainer
        until = next(stop for stop in self.stops if stop > trainer.step)
        try:
            with self.watch.ticking():
                trainer.advance(until - trainer.step)
        except FloatingPointError as error:
            return self._end("failed", error=str(error))
        if trainer.step in self.marks:
            self._evaluate()

    def _evaluate(self) -> None:
        row = evaluation(self.trainer, self.watch)
        self.run.append(row)
        self.rows.append(row)
        self._judge()

    def _judge(self) -> None:
        crossing, steps = None, self.trainer.plan.steps
        if self.target is not None:
            workload = self.workload
            rows = smoothed(self.rows, workload.metric, workload.smooth)
            crossing = find_crossing(rows, workload.metric, self.target, workload.falls, steps)
        if crossing and crossing.confirmed:
            self._end("target", crossing={"before": crossing.before, "at": crossing.at})
        elif self.trainer.finished:
            self._end("done")
        elif time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Keep what a later call needs to go on from here."""
        checkpoint.save(self.trainer, self.run.checkpoints, watch=seconds(self.watch))
        checkpoint.prune(self.run.checkpoints, keep=1)
        self._saved = time.monotonic()

    def interrupt(self) -> None:
        """Stop here, to go on at a later call."""
        self.run.update(state="interrupted", clock=clock(self.watch))

    def _end(self, state: str, **fields: Any) -> None:
        self.state = state
        self.run.update(state=state, clock=clock(self.watch), **fields)
        checkpoint.prune(self.run.checkpoints, keep=0)

    def standing(self) -> Standing:
        """Where it is."""
        metric = self.rows[-1][self.workload.metric] if self.rows else None
        fraction = self.trainer.step / self.trainer.plan.steps
        return Standing(
            self.entry.label, self.seed, fraction, self.trainer.loss, metric, self.watch.wall, self.state
        )


class Probe:
    """Measures again what the steps of a stored run cost, in blocks spread over the steps that it took.

    Each seed has a probe of its own, beside the new runs of that seed, so that what the machine does meanwhile falls on
    all of them, and the spread of the clock is in the interval as it was in the race. Together the probes of an arm
    take about the steps of one run, or PROBE_BLOCKS a seed where those are more.
    """

    def __init__(self, workload: Workload, entry: Entry, seed: int) -> None:
        self.entry, self.seed, self.state = entry, seed, "running"
        self.trainer = make_trainer(workload, entry.arm, seed)
        stored = entry.runs.get(seed)
        self.steps = max(1, _steps_counted(stored) if stored else self.trainer.plan.steps)
        self.size = max(1, self.steps // (PROBE_BLOCKS * len(entry.seeds)))
        self.watch, self.done = Stopwatch(), 0
        self.trainer.advance(1)

    def block(self) -> None:
        """Some steps from where this block belongs in the run."""
        last = self.trainer.plan.steps - self.size
        self.trainer.seek(min(last, self.steps * self.done // PROBE_BLOCKS))
        with self.watch.ticking():
            self.trainer.advance(self.size)
        self.done += 1
        if self.done == PROBE_BLOCKS:
            taken = PROBE_BLOCKS * self.size
            self.entry.costs[self.seed] = (self.watch.wall / taken, self.watch.cpu / taken)
            self.state = "measured"

    def standing(self) -> Standing:
        """Where it is."""
        label, share = f"{self.entry.label} (stored; its cost)", self.done / PROBE_BLOCKS
        return Standing(label, self.seed, share, self.trainer.loss, None, self.watch.wall, self.state)

    def interrupt(self) -> None:
        """Nothing to keep: a cost counts when all its blocks are measured."""


def make_trainer(workload: Workload, arm: Arm, seed: int) -> Trainer:
    """The trainer of an arm."""
    return Trainer(workload, arm.recipe, batch=arm.batch, budget=arm.budget, seed=seed)


def race(
    workload: Workload,
    arms: Sequence[Arm],
    store: Store,
    *,
    target: str | None,
    seeds: Sequence[int] = (0, 1, 2),
    control: Control = "same",
    footprints: bool = True,
    watch: Callable[[Sequence[Standing]], None] = lambda standings: None,
) -> str:
    """Race arms to a target of the workload (None: each to the end of its budget); returns the race's id.

    The first arm is the reference, and the control is the same arm again: on the same seeds, or on fresh ones.
    What is stored is not trained again. Ctrl-C keeps everything and marks the race as interrupted.
    """
    value = None if target is None else workload.targets[target]
    entries = _entries(arms, tuple(seeds), control)
    missing: list[tuple[Entry, int]] = []
    sittings: set[str | None] = set()
    for entry in entries:
        for seed in entry.seeds:
            run = store.find(_identity(workload, entry, seed, value))
            if run and run.record["state"] in ENDED:
                entry.runs[seed] = run
                sittings.add(run.record["sitting"])
            else:
                missing.append((entry, seed))
    whole = not missing and len(sittings) == 1 and None not in sittings
    sitting = sittings.pop() if whole else secrets.token_hex(6)
    assert sitting
    order: list[Entry] = []
    interrupted = False
    try:
        if not whole:
            _run_rounds(workload, entries, missing, store, value, sitting, order, watch)
        for entry in entries:
            _describe(workload, entry, entries, footprints)
    except KeyboardInterrupt:
        interrupted = True
    return store.save_race(_record(workload, entries, value, target, control, sitting, order, interrupted))


def _entries(arms: Sequence[Arm], seeds: tuple[int, ...], control: Control) -> list[Entry]:
    entries = [Entry(arm, arm.name, seeds) for arm in arms]
    if control != "off":
        fresh = tuple(seed + 10_000 for seed in seeds) if control == "fresh" else seeds
        entries.insert(1, Entry(arms[0], f"{arms[0].name} (control)", fresh, int(control == "same")))
    return entries


def _run_rounds(
    workload: Workload,
    entries: list[Entry],
    missing: list[tuple[Entry, int]],
    store: Store,
    target: float | None,
    sitting: str,
    order: list[Entry],
    watch: Callable[[Sequence[Standing]], None],
) -> None:
    """Seed by seed, the contestants that are missing, in blocks of random order, with probes of what is stored."""
    for arm in {id(entry.arm): entry.arm for entry in entries}.values():
        make_trainer(workload, arm, seed=0).advance(1)  # what is paid once a process is on nobody's clock
    resumed = {
        (entry, seed)
        for entry, seed in missing
        if (run := store.find(_identity(workload, entry, seed, target))) and checkpoint.find(run.checkpoints)
    }
    waiting: list[Contestant | Probe] = []
    seats = max((len(entry.seeds) for entry in entries), default=0)
    for seat in range(seats):
        seated = [(entry, entry.seeds[seat]) for entry in entries if seat < len(entry.seeds)]
        field, waiting = waiting, []
        field += [
            Probe(workload, entry, seed)
            for entry, seed in seated
            if seed in entry.runs or (entry, seed) in resumed
        ]
        for entry, seed in seated:
            if (entry, seed) in missing:
                run = open_run(store, workload, entry, seed, target, sitting)
                entry.runs[seed] = run
                field.append(Contestant(workload, entry, seed, run, target))
        if all(isinstance(one, Probe) for one in field) and seat < seats - 1 and _later(missing, seat):
            waiting = field  # measure beside new runs, where there are any to come
            continue
        _alternate(field, random.Random(stable_hash(sitting, seat)), order, watch)


def _later(missing: list[tuple[Entry, int]], seat: int) -> bool:
    return any(entry.seeds.index(seed) > seat for entry, seed in missing)


def _alternate(
    field: Sequence[Contestant | Probe],
    chance: random.Random,
    order: list[Entry],
    watch: Callable[[Sequence[Standing]], None],
) -> None:
    try:
        while alive := [one for one in field if one.state == "running"]:
            chance.shuffle(alive)
            for one in alive:
                order.append(one.entry)
                one.block()
                watch([each.standing() for each in field])
    except BaseException:
        for one in field:
            if one.state == "running":
                one.interrupt()
        raise


def open_run(
    store: Store, workload: Workload, entry: Entry, seed: int, target: float | None, sitting: str | None
) -> Run:
    """The stored run if it can go on from a checkpoint, else a new one; without a sitting its seconds never count."""
    identity = _identity(workload, entry, seed, target)
    stored = store.find(identity)
    if stored and checkpoint.find(stored.checkpoints):
        return stored
    return store.create(identity, first_record(identity, workload, entry.arm, entry.label, sitting))


def _identity(workload: Workload, entry: Entry, seed: int, target: float | None) -> dict[str, Any]:
    return identify(workload, entry.arm, seed, target, replicate=entry.replicate)


def _steps_counted(run: Run) -> int:
    """Steps to the target, or all that were taken."""
    if run.record["state"] == "target":
        return int(run.record["crossing"]["at"])
    rows = run.rows()
    return int(rows[-1]["step"]) if rows else 0


def _describe(workload: Workload, entry: Entry, entries: list[Entry], footprints: bool) -> None:
    """Parameters and footprint of an arm; kept in its runs, equal for a control and at another budget."""
    own = (entry.arm.recipe, entry.arm.batch)
    alike = (other for other in entries if (other.arm.recipe, other.arm.batch) == own)
    twin = next((other for other in alike if other.parameters), None)
    if twin:
        entry.parameters, entry.footprint = twin.parameters, twin.footprint
        return
    trainer = make_trainer(workload, entry.arm, seed=0)
    entry.parameters = sum(p.numel() for p in trainer.model.parameters())
    known = [found for run in entry.runs.values() if (found := _footprint(run)) != UNKNOWN]
    if known or footprints:
        entry.footprint = known[0] if known else footprint(type(workload), entry.arm)
    for run in entry.runs.values():
        if _footprint(run) != entry.footprint:
            run.update(**entry.footprint._asdict())


def _footprint(run: Run) -> Footprint:
    return Footprint(run.record.get("memory"), run.record.get("flops"))


def _record(
    workload: Workload,
    entries: list[Entry],
    value: float | None,
    target: str | None,
    control: Control,
    sitting: str,
    order: list[Entry],
    interrupted: bool,
) -> dict[str, Any]:
    """The race as it is stored: which runs, what they took in this sitting, in which order of arms."""
    places = {id(entry): place for place, entry in enumerate(entries)}
    return {
        "workload": workload.name,
        "metric": workload.metric,
        "falls": workload.falls,
        "smooth": workload.smooth,
        "fingerprint": workload.fingerprint,
        "target": value,
        "target_name": target,
        "target_valid": workload.fingerprint == workload.measured_on,
        "reference": entries[0].label,
        "control": entries[1].label if control != "off" else None,
        "sitting": sitting,
        "interrupted": interrupted,
        "order": [places[id(entry)] for entry in order],
        "arms": [
            {
                "name": entry.label,
                "recipe": entry.arm.recipe.to_json(),
                "short": str(entry.arm.recipe),
                "hash": entry.arm.recipe.hash,
                "batch": entry.arm.batch or workload.batch,
                "budget": entry.arm.budget or workload.budget,
                "parameters": entry.parameters,
                **entry.footprint._asdict(),
                "runs": [run.id for run in entry.runs.values()],
                "times": {run.id: _time(entry, run, sitting) for run in entry.runs.values()},
            }
            for entry in entries
        ],
    }


def _time(entry: Entry, run: Run, sitting: str) -> dict[str, Any]:
    """Seconds to the target (or to the end) that compare inside this sitting, or why there are none."""
    steps = _steps_counted(run)
    if run.record["sitting"] == sitting:
        row = next((row for row in run.rows() if row["step"] == steps), None)
        return (
            {"wall": row["wall"], "cpu": row["cpu"], "source": "sitting"}
            if row
            else {"why": "it has no evaluation"}
        )
    if cost := entry.costs.get(run.record["seed"]):
        return {"wall": cost[0] * steps, "cpu": cost[1] * steps, "source": "remeasured"}
    return {"why": "it was stored in another sitting, and its cost was not measured again in this one"}
