"""Write the runs of a store as one JSON line each: what was run, its outcome, and its evaluations.

python records/export.py runs/tune/baseline records/2026-11-21-stdlib-gpt/baseline.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stretto.measure.store import Store

KEPT = (
    "id",
    "sitting",
    "arm",
    "recipe",
    "budget",
    "seed",
    "execution",
    "versions",
    "state",
    "crossing",
    "clock",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    store = Store(options.store, write=False)
    lines = []
    for run in sorted(store.runs(), key=lambda run: (run.path.stat().st_mtime, run.id)):
        record = {key: run.record[key] for key in KEPT} | {"batch": run.record["identity"]["batch"]}
        columns = [
            key for key in ("step", "wall", "cpu", "train_loss", "loss", "accuracy") if key in run.rows()[0]
        ]
        rows = [[round(row[key], 5) for key in columns] for row in run.rows()]
        lines.append(json.dumps(record | {"columns": columns, "rows": rows}, separators=(",", ":")))
    options.file.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} runs in {options.file}")


if __name__ == "__main__":
    main()
