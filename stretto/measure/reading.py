"""What of a folder can be read: the rest is named in a sentence and left out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from stretto.measure.store import SCHEMA, Run, Store


def readable(runs: Iterable[Run]) -> tuple[dict[str, Run], list[str]]:
    """The runs by name, and a sentence on each that this version cannot read, or whose last line is torn."""
    found, told = {}, []
    for run in runs:
        schema = run.record.get("schema", SCHEMA)
        if not isinstance(schema, int) or schema > SCHEMA:
            told.append(
                f"Run {run.id} is left out: its run.json has schema {schema}, this version reads {SCHEMA}."
            )
        elif missing := {"state", "seed"} - run.record.keys():
            told.append(f"Run {run.id} is left out: its run.json lacks {' and '.join(sorted(missing))}.")
        else:
            found[run.id] = run
            if _torn(run):
                told.append(f"The last evaluation of run {run.id} was torn by a kill and is left out.")
    return found, told


def _torn(run: Run) -> bool:
    """Whether its evaluations do not end with a line's end."""
    try:
        with (run.path / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return size > 0 and file.read() != b"\n"
    except FileNotFoundError:
        return False


def tunings(store: Store, workload: str) -> list[dict[str, Any]]:
    """The stored tunings of a workload, the oldest first; those that cannot be read are left out."""
    found = []
    for path in (store.root / "tunings").glob("[!.]*.json"):
        try:
            tuning = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(tuning, dict) and (tuning.get("schema"), tuning.get("workload")) == (SCHEMA, workload):
            found.append(tuning)
    return sorted(found, key=lambda tuning: str(tuning.get("created")))
