"""Runs trained elsewhere are the runs that a race would have trained, and a worker that dies is not the end."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ADAMW, SLOW, Tiny

from stretto.measure import executors
from stretto.measure.executors import RETRIES, Task, fill, train
from stretto.measure.race import race
from stretto.measure.store import Store

TARGET = Tiny.targets["baseline"]


def filled(store: Store, executor: Any, seeds: Sequence[int] = (0,)) -> dict[str, list[float]]:
    fill(Tiny(), [ADAMW, SLOW], store, seeds, TARGET, executor, 3)
    return losses(store)


def losses(store: Store) -> dict[str, list[float]]:
    return {run.id: [row["loss"] for row in run.rows()] for run in store.runs()}


def raced(root: Path) -> dict[str, list[float]]:
    store = Store(root)
    race(Tiny(), [ADAMW, SLOW], store, target="baseline", seeds=[0], control="off", footprints=False)
    return losses(store)


def task(store: Store, seed: int = 0) -> Task:
    return Task(Tiny, Tiny.eval_every, Tiny.smooth, ADAMW, seed, TARGET, store.root, torch.get_num_threads())


def test_a_task_trains_what_a_race_would_and_belongs_to_no_sitting(tmp_path: Path) -> None:
    store = Store(tmp_path / "task")
    train(task(store))
    (run,) = store.runs()
    assert losses(store)[run.id] == raced(tmp_path / "race")[run.id]
    assert run.record["state"] == "target" and run.record["sitting"] is None


def test_a_task_is_evaluated_as_often_as_its_race(tmp_path: Path) -> None:
    workload, store = Tiny(), Store(tmp_path)
    workload.eval_every = 0.1
    fill(workload, [SLOW], store, (0,), -1.0, "processes", 1)
    (run,) = store.runs()
    assert len(run.rows()) == 10


def workers_that(codes: list[str], store: Store) -> Callable[[Task], subprocess.Popen[bytes]]:
    """Workers that end as each of `codes` says; "train" trains here first."""
    spawned = iter(codes)

    def spawn(one: Task) -> subprocess.Popen[bytes]:
        code = next(spawned)
        if code == "train":
            train(one)
            code = "pass"
        return subprocess.Popen([sys.executable, "-S", "-c", code], stderr=subprocess.PIPE)

    return spawn


DIES = "import os; os.kill(os.getpid(), 9)"


def test_a_worker_that_dies_is_tried_twice_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(executors, "_spawn", workers_that([DIES, DIES, "train"], store))
    fill(Tiny(), [ADAMW], store, [0], TARGET, "processes", 1)
    assert [run.record["state"] for run in store.runs()] == ["target"]


def test_a_run_whose_worker_always_dies_is_named_when_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    refuses = "import sys; sys.exit('out of luck')"
    monkeypatch.setattr(executors, "_spawn", workers_that([DIES, "train", DIES, refuses], store))
    with pytest.raises(
        ValueError, match=r"1 of 2 runs died, each tried 3 times \(adamw, seed 0: out of luck\)"
    ):
        fill(Tiny(), [ADAMW], store, [0, 1], TARGET, "processes", 1)
    assert [(run.record["seed"], run.record["state"]) for run in store.runs()] == [(1, "target")]


def test_what_is_stored_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    train(task(store))
    monkeypatch.setattr(executors, "_spawn", workers_that([], store))
    fill(Tiny(), [ADAMW], store, [0], TARGET, "processes", 1)


class FakeRay(types.ModuleType):
    """What is used of Ray, in this process: tasks run when they are waited for, some lose their worker."""

    def __init__(self, lost: set[int]) -> None:
        super().__init__("ray")
        self.lost, self.asked, self.most = lost, {}, 0
        self.exceptions = types.SimpleNamespace(RayError=RuntimeError)

    def is_initialized(self) -> bool:
        return True

    def remote(self, function: Callable[[Task], None]) -> Any:
        def options(**asked: Any) -> Any:
            self.asked = asked
            return types.SimpleNamespace(remote=lambda one: (function, one))

        return types.SimpleNamespace(options=options)

    def wait(self, working: list[Any]) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(working))
        return working[:1], working[1:]

    def get(self, working: tuple[Callable[[Task], None], Task]) -> None:
        function, one = working
        if one.seed in self.lost:
            raise RuntimeError("a long trace\nthe worker died")
        function(one)


def test_ray_is_asked_for_the_cores_of_a_run_and_names_what_it_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(lost={1})
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ValueError, match=r"adamw, seed 1: the worker died.*slow, seed 1"):
        filled(Store(tmp_path), "ray", seeds=(0, 1))
    assert ray.most == 3
    assert ray.asked["num_cpus"] == torch.get_num_threads() and ray.asked["max_retries"] == RETRIES
    states = [(run.record["arm"], run.record["state"]) for run in Store(tmp_path).runs()]
    assert sorted(states) == [("adamw", "target"), ("slow", "done")]


def test_without_ray_the_way_to_get_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'stretto\[ray\]'"):
        filled(Store(tmp_path), "ray")


@pytest.mark.slow
def test_fresh_processes_train_the_runs_of_a_race(tmp_path: Path) -> None:
    assert filled(Store(tmp_path / "processes"), "processes") == raced(tmp_path / "race")


@pytest.mark.slow
def test_a_local_ray_cluster_trains_the_runs_of_a_race_and_outlives_a_lost_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal runs although one worker was killed in its first attempt."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error", include_dashboard=False)
    try:
        monkeypatch.setattr(executors, "train", dies_once)
        assert filled(Store(tmp_path / "ray"), "ray") == raced(tmp_path / "race")
        assert (tmp_path / "ray" / "died").exists()
    finally:
        ray.shutdown()


def dies_once(one: Task) -> None:
    """As `train`, but the first worker to come here is killed."""
    try:
        (one.root / "died").touch(exist_ok=False)
    except FileExistsError:
        train(one)
    else:
        os.kill(os.getpid(), 9)
