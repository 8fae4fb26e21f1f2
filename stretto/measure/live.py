"""What is shown while a race runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.table import Table

    from stretto.measure.race import Standing

PLAIN_SECONDS = 5.0  # between plain lines


class Watch(Protocol):
    """Whoever wants to know where the contestants are."""

    def __call__(self, standings: Sequence[Standing]) -> None:
        """Called after each block."""


@contextmanager
def shown(metric: str, target: float | None, falls: bool) -> Iterator[Watch]:
    """Within it, what `race(watch=...)` is given shows standings on standard output."""
    if not sys.stdout.isatty():
        yield _Lines(metric, target, falls)
        return
    from rich.live import Live

    with Live(refresh_per_second=8, transient=True) as live:
        yield lambda standings: live.update(draw(standings, metric, target, falls))


@contextmanager
def hidden(*_: object) -> Iterator[Watch]:
    """As `shown`, where another rank shows them."""
    yield lambda standings: None


def leader(standings: Sequence[Standing], falls: bool) -> Standing | None:
    """Who reached the target in the least time, or else is nearest to it; stored runs do not lead."""
    racing = [one for one in standings if one.metric is not None]
    if not racing:
        return None
    there = [one for one in racing if one.state == "target"]
    if there:
        return min(there, key=lambda one: one.wall)
    return min(racing, key=lambda one: (one.metric or 0.0) * (1 if falls else -1))


def draw(standings: Sequence[Standing], metric: str, target: float | None, falls: bool) -> Table:
    """The standings as a table."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    ahead = leader(standings, falls)
    seeds = sorted({one.seed for one in standings if one.seed >= 0})
    goal = "" if target is None else f", target {metric} {target:g}"
    table = Table(title=f"seed {', '.join(map(str, seeds))}{goal}", title_justify="left")
    for name in ("recipe", "budget", "train loss", metric, "clock", ""):
        table.add_column(name, justify="left" if name in ("recipe", "") else "right")
    for one in standings:
        note = {"target": "reached", "done": "ended", "running": ""}.get(one.state, one.state)
        table.add_row(
            Text(one.label, style="bold" if one is ahead else ""),
            ProgressBar(total=1.0, completed=one.fraction, width=20),
            "" if math.isnan(one.loss) else f"{one.loss:.3f}",
            "" if one.metric is None else f"{one.metric:.4f}",
            f"{one.wall:.1f} s",
            f"{note}{', leads' if one is ahead else ''}".removeprefix(", "),
        )
    return table


class _Lines:
    """One line every few seconds, and one when a contestant ends."""

    def __init__(self, metric: str, target: float | None, falls: bool) -> None:
        self.metric, self.falls = metric, falls
        self.last = time.monotonic()
        self.ended: set[tuple[str, int]] = set()
        if target is not None:
            print(f"target: {metric} {target:g}", flush=True)

    def __call__(self, standings: Sequence[Standing]) -> None:
        for one in standings:
            if one.state != "running" and (one.label, one.seed) not in self.ended:
                self.ended.add((one.label, one.seed))
                print(self._line(one), flush=True)
        if time.monotonic() - self.last > PLAIN_SECONDS:
            self.last = time.monotonic()
            ahead = leader(standings, self.falls)
            if ahead and ahead.state == "running":
                print(f"{self._line(ahead)} leads", flush=True)

    def _line(self, one: Standing) -> str:
        seed = f" seed {one.seed}" if one.seed >= 0 else ""
        value = "" if one.metric is None else f" {self.metric} {one.metric:.4f}"
        return f"{one.label}{seed}: {one.state}, {one.fraction:.0%} of its budget,{value} {one.wall:.1f} s"
