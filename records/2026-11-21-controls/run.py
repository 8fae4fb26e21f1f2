"""Can the clock be trusted? The digits baseline raced against itself, 20 times on the same seeds, 20 on others.

    python records/2026-11-21-controls/run.py --out runs-controls

On the same seeds both arms are equal in every bit, so the interval shows the clock alone; on other seeds it
shows whether intervals of the speed-up cover the truth, which is 1. Writes one JSON line a race to
controls.jsonl beside this file and prints how many intervals contain 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from stretto.measure.race import Control, race
from stretto.measure.store import Store
from stretto.measure.summary import summarise
from stretto.recipes import arms
from stretto.workloads import find

RACES, SEEDS = 20, 3


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
    races: list[dict[str, Any]] = []
    kinds: tuple[Control, ...] = ("same", "fresh")
    for kind in kinds:
        for number in range(RACES):
            found = control_race(Store(options.out / kind), kind, number)
            races.append(found)
            print(f"{kind} {number:2}: {found['estimate']} [{found['low']}, {found['high']}]", flush=True)
    lines = (json.dumps(found, separators=(",", ":")) for found in races)
    Path(__file__).with_name("controls.jsonl").write_text("\n".join(lines) + "\n")
    for kind in kinds:
        mine = [found for found in races if found["control"] == kind]
        inside = sum(found["low"] <= 1 <= found["high"] for found in mine)
        half = statistics.median(
            (found["high"] / found["low"]) ** 0.5 - 1 for found in mine if found["low"] > 0
        )
        print(f"{kind} seeds: {inside} of {len(mine)} intervals contain 1, median half-width {half:.1%}")


if __name__ == "__main__":
    main()
