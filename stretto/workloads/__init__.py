"""The workloads, by name."""

from __future__ import annotations

from stretto.core import nearest
from stretto.workloads.digits import Digits
from stretto.workloads.stdlib_gpt import StdlibGPT
from stretto.workloads.workload import Workload

WORKLOADS: dict[str, type[Workload]] = {cls.name: cls for cls in (StdlibGPT, Digits)}


def find(name: str, evaluations: int | None = None, smooth: int = 1) -> Workload:
    """A workload with its data read, evaluated so many times a run (None: as often as it is wont to), the median of
    the last `smooth` evaluations held against the target.

    Raises ValueError with the nearest names for an unknown one, and for less than one evaluation.
    """
    if name not in WORKLOADS:
        raise ValueError(f"there is no workload {name!r}; {nearest(name, WORKLOADS)}")
    for what, number in (("evaluations a run", evaluations), ("evaluations to take a median of", smooth)):
        if number is not None and number < 1:
            raise ValueError(f"{number} {what} do not tell when a target is reached; take 1 or more")
    workload = WORKLOADS[name]()
    workload.smooth = smooth
    if evaluations is not None:
        workload.eval_every = 1 / evaluations
    return workload


__all__ = ["WORKLOADS", "Digits", "StdlibGPT", "Workload", "find"]
