"""Can the clock be trusted? The digits baseline raced against itself, 20 times on the same seeds, 20 on others; every
second race beside a busy loop on each core.

    python records/2026-11-21-controls/run.py --out runs-controls

One thread: two of them on two cores, one of which something else wants, wait for each other at every operation, and a
step takes 15 times as long. On the same seeds both arms are equal in every bit, so the interval shows the clock alone; on other seeds it
shows whether intervals of the speed-up cover the truth, which is 1. Writes one JSON line a race to
controls.jsonl beside this file and prints how many intervals contain 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stretto.measure.race import Control, race
from stretto.measure.store import Store
from stretto.measure.summary import summarise
from stretto.recipes import arms
from stretto.workloads import find

RACES, SEEDS = 20, 5


def spin() -> None:
    """Be busy until the process ends."""
    while True:
        pass


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """A busy loop on each core beside what runs inside, where they are wanted."""
    cores = (os.cpu_count() or 1) if wanted else 0
    loops = [multiprocessing.Process(target=spin, daemon=True) for _ in range(cores)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.terminate()
            loop.join()


def control_race(store: Store, control: Control, number: int) -> dict[str, Any]:
    """One race of the baseline against itself: its interval, and the runs it comes from."""
    workload = find("digits")
    seeds = range(SEEDS * number, SEEDS * (number + 1))
    baseline = arms("digits", "baseline")["baseline"]
    race_id = race(
        workload, [baseline], store, target="baseline", seeds=seeds, control=control, footprints=False
    )
    found = summarise(store, store.race(race_id))
    twin = found.arms[1]
    assert twin.wall is not None
    wall, runs = (
        twin.wall,
        [[r.seed, r.steps, r.wall, r.cpu, r.reached] for arm in found.arms for r in arm.results],
    )
    return {
        "control": control, "race": number, "method": wall.method, "estimate": wall.estimate, "low": wall.low,
        "high": wall.high, "columns": ["seed", "steps", "wall", "cpu", "reached"], "runs": runs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs-controls"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    races: list[dict[str, Any]] = []
    kinds: tuple[Control, ...] = ("same", "fresh")
    for kind in kinds:
        for number in range(RACES):
            with busy(number % 2 == 1):
                found = control_race(Store(options.out / kind), kind, number)
            races.append({"busy": number % 2 == 1, **found})
            print(
                f"{kind} {number:2}{' busy' if number % 2 else ''}: {found['estimate']} [{found['low']}, {found['high']}]",
                flush=True,
            )
    lines = (json.dumps(found, separators=(",", ":")) for found in races)
    Path(__file__).with_name("controls.jsonl").write_text("\n".join(lines) + "\n")
    for kind, loaded in itertools.product(kinds, (None, False, True)):
        mine = [
            found
            for found in races
            if found["control"] == kind and (loaded is None or found["busy"] is loaded)
        ]
        inside = sum(found["low"] <= 1 <= found["high"] for found in mine)
        half = statistics.median(
            (found["high"] / found["low"]) ** 0.5 - 1 for found in mine if found["low"] > 0
        )
        where = {None: "", False: ", quiet", True: ", beside busy loops"}[loaded]
        print(
            f"{kind} seeds{where}: {inside} of {len(mine)} intervals contain 1, median half-width {half:.1%}"
        )


if __name__ == "__main__":
    main()
