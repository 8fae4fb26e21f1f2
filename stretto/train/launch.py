"""Ranks: what torchrun started joins one process group, and what rank 0 finds holds for all."""

from __future__ import annotations

import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
GRACE = 5.0  # seconds in which a mistake that all ranks find is found by all
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def first(work: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank; what it raises is raised on every rank. All ranks call it."""
    if not dist.is_initialized():
        return work()
    found: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            found = [(work(), None)]
        except Exception as error:
            found = [(None, _sendable(error))]
    dist.broadcast_object_list(found, src=0)
    value, raised = found[0]
    if raised is not None:
        raise raised
    return value  # type: ignore[return-value]


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"rank 0 failed: {type(error).__name__}: {error}")
    return error


@contextmanager
def joined(device: str, timeout: float) -> Iterator[None]:
    """Within it this process is one of the ranks that torchrun started; without torchrun it is alone.

    device: "cpu", "cuda" or "auto". timeout: seconds after which a rank that waits for others gives up.
    """
    if not is_rank():
        yield
        return
    _check_restarts()
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield
    except ValueError as error:
        if not _is_first_to_say(str(error)):
            raise SystemExit(2) from None
        raise
    dist.destroy_process_group()  # not after an error, when others may wait for what never comes


def _is_first_to_say(text: str) -> bool:
    """Whether no rank has said this. Rank 0, which keeps the store, stays for those who are to ask it too."""
    store, until = dist.distributed_c10d._get_default_store(), time.monotonic() + GRACE
    is_first = store.add(text, 1) == 1
    while rank() == 0 and store.add(text, 0) < dist.get_world_size() and time.monotonic() < until:
        time.sleep(0.01)
    return is_first


def leave(code: int) -> NoReturn:
    """End a rank, but leave Python standing: torch's threads may abort in its fall, for which torchrun restarts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_restarts() -> None:
    restarts, shares = int(os.environ["TORCHELASTIC_MAX_RESTARTS"]), os.environ.get(OWN_STORE) != "1"
    if os.environ["RANK"] == "0" and restarts and shares:
        warnings.warn(
            f"restarts may hang, since restarted ranks find the addresses of those before: set {OWN_STORE}=1 "
            "for torchrun itself, or start with: stretto train ... --ranks N --restarts K",
            stacklevel=4,
        )


def become_torchrun(ranks: int, restarts: int, arguments: Sequence[str]) -> NoReturn:
    """Turn this process into a torchrun on this machine, whose ranks call `stretto` with these arguments."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}", "-m", "stretto", *arguments,
    ]  # fmt: skip
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ | {OWN_STORE: "1"})
