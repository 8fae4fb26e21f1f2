"""One run of a workload to the end of its budget, alone or on many ranks, that goes on after a kill.

Rank 0 records it; all ranks save. What depends on a clock or a signal is agreed, so that ranks stay in step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from stretto.measure.clock import Stopwatch
from stretto.measure.race import Standing
from stretto.measure.recording import clock, evaluation, first_record, identify, marks, seconds
from stretto.measure.store import ENDED, Run, Store, WatchedRun
from stretto.train import Trainer, checkpoint
from stretto.train.launch import first, rank
from stretto.train.signals import asked_to_stop

if TYPE_CHECKING:
    from stretto.recipes import Arm
    from stretto.train.parallel import Execution
    from stretto.workloads import Workload

AGREE_SECONDS = 0.5  # between agreements of ranks on whether to save or to stop
KEPT = 2  # checkpoints of a run under way


def train(
    workload: Workload,
    arm: Arm,
    out: Path,
    *,
    execution: Execution,
    seed: int = 0,
    slices: int | None = None,
    save_every: float = 300.0,
    watch: Callable[[Sequence[Standing]], None] = lambda standings: None,
) -> Run:
    """Train, or go on with what is stored of this run; all ranks call it. A run that ended is not repeated.

    slices: None is what an unfinished run that is else the same has, where these ranks can share it, and the
    number of ranks at the start. save_every: seconds between checkpoints. SIGTERM and SIGINT end it with a
    checkpoint and the state "interrupted".
    """
    ranks = _data_ranks(execution)
    found = first(lambda: _open(workload, arm, Store(out), seed, slices, execution, ranks))
    run = Run(*found) if rank() == 0 else WatchedRun(*found)
    if run.record["state"] not in ENDED:
        _Training(workload, arm, run, execution, save_every, watch).go_on()
    return run


def _data_ranks(execution: Execution) -> int:
    """How many ranks take shares of a batch: those of a tensor-parallel group share theirs."""
    mesh = execution.mesh()
    if mesh is None:
        return 1
    names = mesh.mesh_dim_names or ()
    return math.prod(size for name, size in zip(names, mesh.shape) if name != "tp")


def _open(
    workload: Workload,
    arm: Arm,
    store: Store,
    seed: int,
    slices: int | None,
    execution: Execution,
    ranks: int,
) -> tuple[Path, dict[str, Any]]:
    """Folder and record of the stored run, or of a new one."""

    def identity(slices: int) -> dict[str, Any]:
        return identify(workload, arm, seed, None, execution=execution, slices=slices)

    stored = None if slices else _unfinished(store, workload.name, identity, ranks)
    mine = identity(slices or ranks)
    run = stored or store.find(mine) or store.create(mine, first_record(mine, workload, arm, arm.name, None))
    return run.path, run.record


def _unfinished(
    store: Store, workload: str, identity: Callable[[int], dict[str, Any]], ranks: int
) -> Run | None:
    """The newest run under way that is the same but for the slices, which these ranks can share."""
    found = []
    for run in store.runs(workload):
        known = run.record["identity"]
        slices = known["execution"].get("slices", 1)
        if run.record["state"] not in ENDED and slices % ranks == 0 and known == identity(slices):
            found.append(run)
    return max(found, key=lambda run: (run.path / "run.json").stat().st_mtime, default=None)


class _Training:
    """A trainer, its clock and its record."""

    def __init__(
        self,
        workload: Workload,
        arm: Arm,
        run: Run,
        execution: Execution,
        save_every: float,
        watch: Callable[[Sequence[Standing]], None],
    ) -> None:
        self.arm, self.run, self.save_every, self.watch = arm, run, save_every, watch
        self.trainer = Trainer(
            workload,
            arm.recipe,
            batch=arm.batch,
            budget=arm.budget,
            seed=run.record["seed"],
            slices=run.record["execution"].get("slices", 1),
            execution=execution,
        )
        self.clock = Stopwatch()
        if found := checkpoint.find(run.checkpoints):
            self.clock = Stopwatch(**checkpoint.load(self.trainer, found)["watch"])
        run.update(state="running", ranks=dist.get_world_size() if dist.is_initialized() else 1)
        self.metric: float | None = None  # at the last evaluation
        self.saved = time.monotonic()
        self.stride = 1  # steps until ranks agree again

    def go_on(self) -> None:
        """Train to the end of the budget, or until asked to stop."""
        trainer, due = self.trainer, marks(self.trainer)
        with asked_to_stop() as asked:
            while not trainer.finished:
                try:
                    self._advance(min(mark for mark in due if mark > trainer.step))
                except FloatingPointError as error:
                    self._end("failed", error=str(error))
                    return
                if trainer.step in due:
                    row = evaluation(trainer, self.clock)
                    self.run.append(row)
                    self.metric = row[trainer.workload.metric]
                if self._agree_on_stopping(asked):
                    self._end("interrupted")
                    return
            self._save(keep=1)
            self._end("done")

    def _advance(self, mark: int) -> None:
        """Some steps, at most to a mark; and how many the next are to be."""
        before, wall = self.trainer.step, self.clock.wall
        with self.clock.ticking():
            self.trainer.advance(min(self.stride, mark - before))
        each = (self.clock.wall - wall) / (self.trainer.step - before)
        self.stride = max(1, int(min(AGREE_SECONDS, self.save_every) / each))

    def _agree_on_stopping(self, asked: Callable[[], int]) -> bool:
        """Save where it is time, or where any rank is asked to stop; rank 0's clock holds for all."""
        is_due = time.monotonic() - self.saved >= self.save_every
        told = torch.tensor([asked(), is_due, self.stride] if rank() == 0 else [asked(), 0, 0])
        if dist.is_initialized():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        number, is_due, self.stride = told.tolist()
        if number or is_due:
            self._save(keep=KEPT)
        self._show("interrupted" if number else "running")
        return bool(number)

    def _save(self, keep: int) -> None:
        checkpoint.save(self.trainer, self.run.checkpoints, watch=seconds(self.clock))
        checkpoint.prune(self.run.checkpoints, keep)
        self.saved = time.monotonic()

    def _end(self, state: str, **fields: Any) -> None:
        self.run.update(state=state, clock=clock(self.clock), **fields)
        self._show(state)

    def _show(self, state: str) -> None:
        plan = self.trainer.plan
        self.watch([
            Standing(
                self.arm.name, plan.seed, self.trainer.step / plan.steps, self.trainer.loss, self.metric,
                self.clock.wall, state,
            )
        ])  # fmt: skip
