"""A study that is killed, or whose disk fills up, loses nothing that it had stored."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import ADAMW, Tiny

from stretto.measure import designs
from stretto.measure import race as racing
from stretto.measure.store import Store
from stretto.measure.study import run
from stretto.measure.study_plan import StudyPlan, plan_study
from stretto.measure.study_summary import study_table, summarise_study
from stretto.methods import parse

KILLS = 20
KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from test_study_survives import longer, plan, study_steps
from stretto.measure import race
from stretto.measure.store import Store
from stretto.measure.study import run

torch.set_num_threads(1)
race.CHECKPOINT_SECONDS = 0.0
longer()

def study(root):
    store = Store(root)
    run(plan(store), store, footprints=False)

def evaluations():
    return sum(len(run.rows()) for run in Store(sys.argv[2]).runs())

study(sys.argv[3])  # first here, so that what is imported at the first step is there when a child starts
kills, chance = 0, random.Random(0)
while kills < int(sys.argv[4]):
    if not (child := os.fork()):
        study(sys.argv[2])
        os._exit(0)
    until, patience = evaluations() + chance.randint(0, 6), time.monotonic() + 20
    while evaluations() < until and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print("killed after", evaluations(), "evaluations", flush=True)
study(sys.argv[2])
print(study_steps(sys.argv[2]) == study_steps(sys.argv[3]))
print(study_steps(sys.argv[2]))
"""


def longer() -> None:
    """Make the tiny workload long enough to be killed in."""
    Tiny.budget, Tiny.eval_every, Tiny.targets = 8 * 200, 0.025, {"baseline": 0.02}


def plan(store: Store) -> StudyPlan:
    methods = parse("ema, sgd:lr=0.05").methods
    return plan_study(Tiny(), "baseline", ADAMW, methods, designs.factorial, range(2), store)


def study_steps(root: str | Path) -> str:
    """The table of the only study, in steps."""
    store = Store(root)
    (name,) = store.studies()
    study = store.study(name)
    assert study["state"] == "done"
    return study_table(summarise_study(store, study, "steps"))


@pytest.mark.slow
def test_a_study_killed_20_times_ends_with_the_table_of_one_that_was_not(tmp_path: Path) -> None:
    """A kill at the wrong moment that loses a run, tears a record or starts a second study."""
    here = str(Path(__file__).parent)
    arguments = [here, str(tmp_path / "killed"), str(tmp_path / "whole"), str(KILLS)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    evaluations = [int(line.split()[2]) for line in lines[:KILLS]]
    assert evaluations == sorted(evaluations) and len(set(evaluations)) > KILLS // 4
    assert lines[KILLS] == "True" and "adamw" not in lines[KILLS + 1], done.stdout


@contextmanager
def full_after(bytes_of_a_file: int) -> Iterator[None]:
    """No file may grow further: what a full disk says, from within the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_space(after: int) -> Iterator[None]:
    """The disk takes so many rows, and no more."""
    write, left = os.write, [after]

    def full(descriptor: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", full)
        yield


@pytest.mark.filterwarnings("ignore:.* is torn, so an older checkpoint:UserWarning")
@pytest.mark.parametrize(
    ("checkpoint_seconds", "full"),
    [(10.0, lambda: no_space(after=30)), (10.0, lambda: full_after(2_000)), (0.0, lambda: full_after(2_500))],
    ids=["no space", "no row fits", "no checkpoint fits"],
)
def test_a_full_disk_stops_with_one_line_and_a_readable_store(
    checkpoint_seconds: float,
    full: Callable[[], Iterator[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(racing, "CHECKPOINT_SECONDS", checkpoint_seconds)
    store = Store(tmp_path / "cut")
    planned = plan(store)
    with (
        full(),
        pytest.raises(ValueError, match=r"the disk of .* is full; make room and give the same") as told,
    ):
        run(planned, store, footprints=False)
    assert "\n" not in str(told.value)
    assert [store.study(name)["state"] for name in store.studies()] == ["running"]
    assert all("state" in stored.record for stored in Store(tmp_path / "cut").runs())
    run(planned, store, footprints=False)
    whole = Store(tmp_path / "whole")
    run(plan(whole), whole, footprints=False)
    assert study_steps(store.root) == study_steps(whole.root)
