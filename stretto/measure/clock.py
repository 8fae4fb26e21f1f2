"""What counts as training time: a stopwatch that ticks in its own blocks only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall and CPU seconds (of all threads of this process) spent inside `ticking()`."""

    def __init__(self, wall: float = 0.0, cpu: float = 0.0) -> None:
        self.wall, self.cpu = wall, cpu

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Count the time spent within."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu
