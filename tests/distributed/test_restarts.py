"""The command under torchrun: ranks that die, fewer ranks, and signals; every run ends as an unbroken one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stretto.measure.store import Store

HERE = Path(__file__).parent
STEPS = 160
SECONDS = 250  # that a run may take on a busy machine, restarts and the start of Python included
KILLS = 10
pytestmark = pytest.mark.timeout(3 * SECONDS)


def command(out: Path, *options: str) -> list[str]:
    options = ("--out", str(out), "--save-every", "0.2", "--timeout", "60", "--device", "cpu", *options)
    return ["train", "lines", "--recipe", f"baseline @ budget={16 * STEPS}", *options]


def torchrun(ranks: int, restarts: int, *options: str) -> list[str]:
    count = (f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *options)
    return ["-m", "torch.distributed.run", *count, str(HERE / "lines.py")]


def start(out: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Python with these arguments; settings are those of `lines`."""
    (out / "pids").mkdir(parents=True, exist_ok=True)
    environment = os.environ | settings | {
        "PIDS": str(out / "pids"), "PAUSE": "0.01", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, text=True, cwd=HERE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int | None = 0) -> str:
    """What it printed; it ends within the time, with this exit code."""
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    finally:
        end(process)
    assert code is None or process.returncode == code, printed
    return printed


def end(process: subprocess.Popen[str]) -> None:
    """The launcher, and its ranks, which have sessions of their own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for pid in [process.pid, *map(int, children.read_text().split())] if children.exists() else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def rows(out: Path) -> list[dict[str, float]]:
    [run] = Store(out).runs()
    return run.rows()


def losses(out: Path) -> list[tuple[float, ...]]:
    return [(row["step"], row["train_loss"], row["loss"]) for row in rows(out)]


def wait(until: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    begin = time.monotonic()
    while not until():
        if process.poll() is not None or time.monotonic() - begin > SECONDS:
            end(process)
            pytest.fail("it ended before, or never came so far")
        time.sleep(0.01)


def reached(out: Path) -> int:
    """The step of the last evaluation."""
    runs = Store(out, write=False).runs() if (out / "stretto.json").exists() else []
    return int(runs[0].rows()[-1]["step"]) if runs and runs[0].rows() else 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    """The evaluations of a run of two ranks."""
    out = tmp_path_factory.mktemp("unbroken")
    printed = finish(start(out, *torchrun(2, 0, "--standalone"), *command(out, "--parallel", "ddp")))
    assert printed.count("done, loss") == 1  # rank 0 alone speaks
    assert len(losses(out)) == 20 and losses(out)[-1][0] == STEPS
    return losses(out)


@pytest.mark.slow
@pytest.mark.timeout(KILLS * SECONDS)
def test_a_rank_killed_at_any_moment_changes_no_loss(
    unbroken: list[tuple[float, ...]], tmp_path: Path
) -> None:
    """Ten runs; in each a rank takes -9 at a random moment after a random step."""
    for attempt in range(KILLS):
        chance, out = random.Random(attempt), tmp_path / str(attempt)
        rank, step, seconds = chance.randrange(2), chance.randrange(1, STEPS - 30), chance.uniform(0, 0.3)
        begin = time.monotonic()
        printed = finish(
            start(
                out, *torchrun(2, 3, "--standalone"), *command(out, "--parallel", "ddp"),
                DEATH=f"{rank} {step} {seconds}", LINGER=str(step + 30),
            )
        )  # fmt: skip
        restarts = len(list((out / "pids").iterdir())) // 2 - 1
        print(
            f"kill {attempt}: rank {rank}, {seconds:.2f} s after step {step} of {STEPS}; {restarts} restart, "
            f"{time.monotonic() - begin:.0f} s in all"
        )
        assert restarts == 1, printed
        assert losses(out) == unbroken


@pytest.mark.slow
def test_a_signal_saves_and_fewer_ranks_go_on(unbroken: list[tuple[float, ...]], tmp_path: Path) -> None:
    """By the same command but for the ranks: the slices are those of the first start."""
    arguments = (*torchrun(2, 0, "--standalone"), *command(tmp_path, "--parallel", "ddp"))
    process = start(tmp_path, *arguments, LINGER="60")
    wait(lambda: reached(tmp_path) > 50, process)
    process.terminate()
    finish(process, code=None)
    [run] = Store(tmp_path).runs()
    assert run.record["state"] == "interrupted" and run.record["ranks"] == 2
    before = reached(tmp_path)
    assert before < STEPS
    finish(start(tmp_path, *torchrun(1, 0, "--standalone"), *command(tmp_path, "--parallel", "ddp")))
    [run] = Store(tmp_path).runs()
    assert (run.record["state"], run.record["ranks"], run.record["execution"]["slices"]) == ("done", 1, 2)
    assert near(losses(tmp_path), unbroken)


def near(found: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> bool:
    return len(found) == len(expected) and all(
        abs(a - b) < 1e-12 for row, other in zip(found, expected) for a, b in zip(row, other)
    )


@pytest.mark.slow
def test_a_machine_that_dies_leaves_the_others_training(
    unbroken: list[tuple[float, ...]], tmp_path: Path
) -> None:
    """Two launchers stand for two machines of one rank each; `--nnodes 1:2` forms again with one.

    Whoever comes first: the one that stays holds the store of the meeting, and slices are given.
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    meeting = ("--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test")
    staying, leaving = (
        start(
            tmp_path,
            *torchrun(1, 3, *meeting, f"--rdzv-conf=is_host={is_host},last_call_timeout=3"),
            *command(tmp_path, "--parallel", "ddp", "--slices", "2"),
            LINGER="30",
        )
        for is_host in (1, 0)
    )
    wait(lambda: reached(tmp_path) > 20 and Store(tmp_path).runs()[0].record["ranks"] == 2, staying)
    end(leaving)
    finish(staying)
    [run] = Store(tmp_path).runs()
    assert (run.record["state"], run.record["ranks"], run.record["execution"]["slices"]) == ("done", 1, 2)
    assert near(losses(tmp_path), unbroken)


@pytest.mark.slow
def test_ranks_are_started_without_torchrun_on_the_command_line(tmp_path: Path) -> None:
    given = ("--recipe", "baseline @ budget=640", "--parallel", "fsdp", "--device", "cpu")
    started = ("--ranks", "2", "--restarts", "1", "--out", str(tmp_path))
    printed = finish(start(tmp_path, "-m", "stretto", "train", "digits", *given, *started))
    assert printed.count("done, accuracy") == 1 and "restarts may hang" not in printed
    [run] = Store(tmp_path).runs()
    assert run.record["ranks"] == 2 and run.record["execution"]["slices"] == 2


def test_one_process_saves_at_a_signal_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    process = start(tmp_path / "cut", "lines.py", *command(tmp_path / "cut"), LINGER="60")
    wait(lambda: reached(tmp_path / "cut") > 50, process)
    process.terminate()
    assert "interrupted" in finish(process, code=130)
    before = reached(tmp_path / "cut")
    assert before < STEPS
    for out in ("cut", "whole"):
        assert "done, loss" in finish(start(tmp_path / out, "lines.py", *command(tmp_path / out)))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
