"""Print the tables of this folder's README from its files.

python records/2026-11-21-stdlib-gpt/tables.py
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHOSEN = {"baseline": (1e-3, 2, 0.0125), "modern": (1e-3, 4, 0.025)}
BUDGETS = {1: 1500, 2: 2080, 4: 2400, 8: 2600, 16: 2720}  # of equal time, as in tune.py


def runs(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def final(run: dict[str, Any]) -> float:
    return run["rows"][-1][run["columns"].index("loss")]


def adamw(run: dict[str, Any]) -> tuple[float, int, float]:
    [fields] = [m for m in run["recipe"]["methods"] if m["method"] == "adamw"]
    return fields["lr"], run["batch"], fields["weight_decay"]


def tuning(arm: str) -> None:
    """The chosen point and its neighbours."""
    found = {adamw(run): final(run) for run in runs(f"{arm}.jsonl") if run["budget"] == BUDGETS[run["batch"]]}
    trials = {(adamw(run), run["budget"]) for run in runs(f"{arm}.jsonl")}
    chosen = CHOSEN[arm]
    print(f"**{arm}**: {len(trials)} trials; lr {chosen[0]:g}, batch {chosen[1]}, weight decay {chosen[2]:g}: "
          f"{found[chosen]:.4f}\n")  # fmt: skip
    print("| | half | chosen | double |\n| --- | ---: | ---: | ---: |")
    for axis, name in enumerate(("learning rate", "batch", "weight decay")):
        cells = []
        for factor in (0.5, 1, 2):
            point = list(chosen)
            point[axis] *= factor
            cells.append(f"{found[tuple(point)]:.4f}")  # type: ignore[index]
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def targets() -> None:
    groups: dict[str, list[float]] = defaultdict(list)
    for run in runs("targets.jsonl"):
        rotary = any(m["method"] == "rotary_positions" for m in run["recipe"]["methods"])
        groups["modern" if rotary else "baseline"].append(final(run))
    print("| arm | final losses of seeds 100 to 104 | deviation | target |\n| --- | --- | ---: | ---: |")
    for arm, losses in sorted(groups.items()):
        spread = statistics.stdev(losses)
        print(
            f"| {arm} | {', '.join(f'{x:.4f}' for x in losses)} | {spread:.4f} | {max(losses) + spread:.4f} |"
        )
    print()


def trials() -> None:
    print("| | loss | steps | CPU s | recipe |\n| ---: | ---: | ---: | ---: | --- |")
    common = {"warmup_stable_decay", "rotary_positions", "squared_relu", "zero_init_residual"}
    for number, run in enumerate(runs("fast.jsonl"), 1):
        last = dict(zip(run["columns"], run["rows"][-1]))
        parts = []
        for method in run["recipe"]["methods"]:
            shown = [
                f"{k}={method[k]:g}"
                for k in ("lr", "adam_lr", "momentum", "iterations", "rate", "rows")
                if k in method
            ]
            if method["method"] not in common:
                parts.append(":".join([method["method"], *shown]))
        print(
            f"| {number} | {last['loss']:.4f} | {last['step']} | {last['cpu']:.1f} | batch {run['batch']}, {', '.join(parts)} |"
        )


if __name__ == "__main__":
    for arm in CHOSEN:
        tuning(arm)
    targets()
    trials()
