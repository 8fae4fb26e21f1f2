"""Several ranks on this machine: forked gloo processes that call one function, and what came of it."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60  # a rank that takes longer hangs


class Failed(Exception):
    """What a rank raised, as text."""


def run(function: Callable[..., Any], ranks: int, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """function(*args) on so many ranks of one gloo group; what each returned (tensors, plain values), by rank.

    Raises AssertionError with the rank's traceback where one failed or hung.
    """
    found = outcomes(function, ranks, *args, seconds=seconds)
    for rank, outcome in enumerate(found):
        assert not isinstance(outcome, Failed), f"rank {rank} of {ranks}: {outcome}"
    return found


def outcomes(function: Callable[..., Any], ranks: int, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """As `run`, with `Failed` in the place of what was raised."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(function, rank, ranks, folder, seconds, args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        until = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        return [_read(Path(folder, f"{rank}.pt"), seconds) for rank in range(ranks)]


def _read(path: Path, seconds: float) -> Any:
    if not path.exists():
        return Failed(f"gave nothing within {seconds} s")
    return torch.load(path, weights_only=False)


def _rank(
    function: Callable[..., Any], rank: int, ranks: int, folder: str, seconds: float, args: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    outcome: Any
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=seconds),
        )  # fmt: skip
        outcome = function(*args)
    except BaseException as error:
        outcome = Failed("".join(traceback.format_exception(error)))
    aside = Path(folder, f"{rank}.aside")
    torch.save(outcome, aside)
    aside.rename(Path(folder, f"{rank}.pt"))
    if not isinstance(outcome, Failed):
        dist.destroy_process_group()
    os._exit(0)
