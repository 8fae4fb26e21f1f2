"""Do stored runs compare with new ones? A study run at once, and the same extended on a machine made slower.

    python records/2026-11-21-reused/run.py --out runs-reused

At once: the digits baseline and four methods, each alone. Extended: the baseline and two of them first, then all
four while busy loops slow the machine down. Both have the same seeds, so their steps are equal in every bit and what
differs is the clock alone: stored steps at the cost that a step has beside the new runs. Writes what it prints, with
all runs, to reused.json beside this file; exit code 1 where an extended study's interval
does not hold the speed-up at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stretto.core import Recipe
from stretto.measure import designs
from stretto.measure.race import make_trainer
from stretto.measure.store import Store
from stretto.measure.study import run
from stretto.measure.study_plan import plan_study
from stretto.measure.summary import Arm, summarise
from stretto.methods import parse
from stretto.recipes import arms
from stretto.workloads import find

FIRST, MORE = "muon, ema", "muon, ema, label_smoothing, mixup"
SEEDS, EVALUATIONS = 5, 100


def spin() -> None:
    """Be busy until the process ends."""
    while True:
        pass


@contextmanager
def slowed() -> Iterator[None]:
    """A busy loop on each core beside what runs inside."""
    loops = [multiprocessing.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.terminate()
            loop.join()


def step_cost() -> float:
    """Seconds of a step of the baseline, the median of ten blocks of twenty."""
    trainer = make_trainer(find("digits"), arms("digits", "baseline")["baseline"], 0)
    trainer.advance(3)
    taken = []
    for _ in range(10):
        trainer.seek(3)
        start = time.perf_counter()
        trainer.advance(20)
        taken.append((time.perf_counter() - start) / 20)
    return statistics.median(taken)


def study(store: Store, chosen: str) -> dict[str, Arm]:
    """Each of the methods alone against the baseline; the arms of the study's race by name."""
    workload = find("digits", EVALUATIONS)
    reference, recipe = arms("digits", "baseline")["baseline"], Recipe(*parse(chosen).methods)
    plan = plan_study(
        workload, "baseline", reference, recipe.methods, designs.alone, range(SEEDS), store
    )  # fmt: skip
    found = summarise(store, store.race(run(plan, store, footprints=False)["race"]))
    return {arm.name: arm for arm in found.arms}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs-reused"))
    out = parser.parse_args().out
    torch.set_num_threads(1)  # two of them would wait for each other at every operation beside the loops
    quiet = step_cost()
    at_once = study(Store(out / "at-once"), MORE)
    study(Store(out / "extended"), FIRST)
    with slowed():
        slow = step_cost()
        extended = study(Store(out / "extended"), MORE)
    print(
        f"the machine was made {slow / quiet:.2f} times slower: {1e3 * quiet:.1f} to {1e3 * slow:.1f} ms a step"
    )
    print("| method | at once | extended | step cost at once | extended | runs stored |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    outside, table = [], []
    for name, arm in at_once.items():
        later = extended[name]
        if arm.wall is None or later.wall is None or arm.wall.estimate is None or later.wall.estimate is None:
            continue
        stored = sum(result.source == "remeasured" for result in later.results)
        costs = [f"{one.parts.step_cost:.3f}" if one.parts else "" for one in (arm, later)]
        print(f"| {name} | {arm.wall.figures} | {later.wall.figures} | {costs[0]} | {costs[1]} | {stored} |")
        if not later.wall.low <= arm.wall.estimate <= later.wall.high:
            outside.append(name)
        table.append({
            "method": name, "at_once": [arm.wall.estimate, arm.wall.low, arm.wall.high],
            "extended": [later.wall.estimate, later.wall.low, later.wall.high], "step_cost": costs,
            "columns": ["seed", "steps", "wall", "source"],
            "runs": [[[r.seed, r.steps, r.wall, r.source] for r in one.results] for one in (arm, later)],
        })  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in table)
    slowdown = f'{{"slowdown": {slow / quiet:.3f}, "methods": [\n{lines}\n]}}\n'
    Path(__file__).with_name("reused.json").write_text(slowdown)
    print(f"not held by the interval of the extended study: {', '.join(outside) or 'none'}")
    return bool(outside)


if __name__ == "__main__":
    sys.exit(main())
