"""The workloads, by name."""

from __future__ import annotations

from stretto.core import nearest
from stretto.workloads.digits import Digits
from stretto.workloads.stdlib_gpt import StdlibGPT
from stretto.workloads.workload import Workload

WORKLOADS: dict[str, type[Workload]] = {cls.name: cls for cls in (StdlibGPT, Digits)}


def find(name: str) -> Workload:
    """A workload with its data read. Raises ValueError with the nearest names for an unknown one."""
    if name not in WORKLOADS:
        raise ValueError(f"there is no workload {name!r}; {nearest(name, WORKLOADS)}")
    return WORKLOADS[name]()


__all__ = ["WORKLOADS", "Digits", "StdlibGPT", "Workload", "find"]
