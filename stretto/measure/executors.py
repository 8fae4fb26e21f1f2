"""Runs of many arms trained side by side, one a task: on this machine's processes, or on a Ray cluster.

They fill the store with outcomes in steps. Their seconds compare with nothing, so they belong to no sitting.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from stretto.measure.footprint import imports
from stretto.measure.race import Contestant, Entry, open_run
from stretto.measure.recording import ALONE, identify
from stretto.measure.store import ENDED, Store, stopping_clearly

if TYPE_CHECKING:
    from stretto.recipes import Arm
    from stretto.workloads import Workload

RETRIES = 2  # of a run whose worker died
POLL = 0.05  # seconds


@dataclass(frozen=True)
class Task:
    """One run to train; `root` is a folder that every worker sees."""

    workload: type[Workload]
    eval_every: float
    smooth: int
    arm: Arm
    seed: int
    target: float | None
    root: Path
    threads: int  # of torch: part of a run's identity, so the same in every worker

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"


def train(task: Task) -> None:
    """Train a run to its target or the end of its budget; one that was begun goes on from its checkpoint."""
    torch.set_num_threads(task.threads)
    workload, store = task.workload(), Store(task.root)
    workload.eval_every, workload.smooth = task.eval_every, task.smooth
    entry = Entry(task.arm, task.arm.name, (task.seed,))
    run = open_run(store, workload, entry, task.seed, task.target, sitting=None)
    contestant = Contestant(workload, entry, task.seed, run, task.target)
    while contestant.state == "running":
        contestant.block()


def fill(
    workload: Workload,
    arms: Sequence[Arm],
    store: Store,
    seeds: Sequence[int],
    target: float | None,
    executor: Literal["processes", "ray"],
    workers: int | None,
) -> None:
    """Train all runs that are not stored. ValueError names those whose workers kept dying, when all others ended."""
    threads, root = torch.get_num_threads(), store.root.resolve()
    tasks = [
        Task(type(workload), workload.eval_every, workload.smooth, arm, seed, target, root, threads)
        for seed in seeds
        for arm in arms
        if not _ended(store, identify(workload, arm, seed, target))
    ]
    if not tasks:
        return
    if executor == "ray":
        died = _ray(tasks, workers)
    else:
        died = _processes(tasks, workers or max(1, (os.cpu_count() or 1) // threads))
    if died:
        named = "; ".join(f"{task}: {words}" for task, words in died.items())
        raise ValueError(
            f"{len(died)} of {len(tasks)} runs died, each tried {RETRIES + 1} times ({named}); the others are "
            "stored, and the same command tries these again"
        )


def _ended(store: Store, identity: dict[str, Any]) -> bool:
    run = store.find(identity)
    return run is not None and run.record["state"] in ENDED


def _processes(tasks: Sequence[Task], workers: int) -> dict[Task, str]:
    """Each task in a fresh process, so many at a time; returns those that died to the last, with last words."""
    waiting = [(task, RETRIES) for task in tasks]
    working: list[tuple[Task, int, subprocess.Popen[bytes]]] = []
    died: dict[Task, str] = {}
    try:
        while waiting or working:
            while waiting and len(working) < workers:
                task, retries = waiting.pop(0)
                working.append((task, retries, _spawn(task)))
            time.sleep(POLL)
            for one in [one for one in working if one[2].poll() is not None]:
                working.remove(one)
                task, retries, process = one
                words = _last_words(process)
                if process.returncode and retries:
                    waiting.append((task, retries - 1))
                elif process.returncode:
                    died[task] = words
    finally:
        for _, _, process in working:
            process.kill()
            process.communicate()
    return died


def _spawn(task: Task) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "stretto.measure.executors"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **imports()},
    )
    assert process.stdin
    process.stdin.write(pickle.dumps(task))
    process.stdin.close()
    return process


def _last_words(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr
    with process.stderr:
        lines = process.stderr.read().decode(errors="replace").strip().splitlines()
    code = process.returncode
    return (
        lines[-1] if lines and code > 0 else f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    )


def _ray(tasks: Sequence[Task], workers: int | None) -> dict[Task, str]:
    """Each task on whatever node of the cluster is free, with a GPU where runs want one; else as `_processes`.

    workers: the most at a time; None: as many as the cluster has room for.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("the executor ray wants Ray: pip install 'stretto[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    gpus = float(ALONE.place.type == "cuda")
    remote = ray.remote(train).options(
        num_cpus=tasks[0].threads,
        num_gpus=gpus,
        max_retries=RETRIES,
        retry_exceptions=True,
        runtime_env={"env_vars": imports()},
    )
    waiting, died = list(tasks), dict[Task, str]()
    working: dict[Any, Task] = {}
    while waiting or working:
        while waiting and len(working) < (workers or len(tasks)):
            task = waiting.pop(0)
            working[remote.remote(task)] = task
        for one in ray.wait(list(working))[0]:
            task = working.pop(one)
            try:
                ray.get(one)
            except ray.exceptions.RayError as error:
                died[task] = str(error).strip().splitlines()[-1]
    return died


if __name__ == "__main__":
    task = pickle.load(sys.stdin.buffer)
    with stopping_clearly(task.root):
        train(task)
