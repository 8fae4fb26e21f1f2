"""`stretto algoperf score`: AlgoPerf's table from its logs, and what the table hides."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from stretto.measure.algoperf import Standings

TAUS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class AlgoPerf:
    """AlgoPerf's scores from its logs, external tuning, version 0.5, with intervals."""

    action: Positional[Literal["score"]]
    """What to do with the logs."""
    logs: Positional[Path]
    """Folder of SUBMISSION/study_K/WORKLOAD/trial_K/eval_measurements.csv, or a table evaluations.csv.gz."""
    rule: Literal["time", "index"] = "time"
    """Which trial of a study is its best: the soonest at the target, or with the fewest evaluations, as the
    official code chooses."""
    format: Literal["table", "csv", "json"] = "table"
    """How to print."""

    def run(self) -> int:
        """Print scores, times and profiles; what the logs lack goes to standard error."""
        from stretto.measure import algoperf

        found = algoperf.score(self.logs, self.rule)
        if self.format == "json":
            print(json.dumps(as_data(found), indent=2, allow_nan=False))
        elif self.format == "csv":
            csv.writer(sys.stdout).writerows([("figure", "submission", "of", "value"), *as_rows(found)])
        else:
            print(as_text(found))
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        return 0


def as_text(found: Standings) -> str:
    """Scores, then times and profiles with a column for each submission under its rank."""
    from stretto.measure.algoperf import BASES, WORKLOADS, profile

    ranks = [str(rank) for rank in range(1, len(found.submissions) + 1)]
    head = ["", "submission", "score", "95 % interval", "above the next", "reached"]
    scores = []
    for i, name in enumerate(found.submissions):
        low, high = found.intervals[i]
        following = f"{found.above[i, i + 1]:.2f}" if i + 1 < len(ranks) else ""
        reached = f"{sum(map(math.isfinite, found.ratios[i]))} of {len(BASES)}"
        scores.append(
            [ranks[i], name, f"{found.scores[i]:.4f}", f"{low:.3f} to {high:.3f}", following, reached]
        )
    times = [[name, *(_seconds(value) for value in column)] for name, column in zip(WORKLOADS, found.times.T)]
    shares = [
        [f"within {tau:g}x", *(f"{share:.3f}" for share in column)]
        for tau, column in zip(TAUS, profile(found.ratios, TAUS).T)
    ]
    chosen = "soonest at the target" if found.rule == "time" else "with the fewest evaluations (official)"
    return "\n".join(
        [
            *_columns(head, scores, left=2),
            "",
            f"A study's best trial is the one {chosen}. Intervals and the probability of scoring above the",
            "next come from drawing the studies of each workload anew, for all submissions at once.",
            "",
            "Seconds to the target, by rank",
            *_columns(["", *ranks], times, left=1),
            "",
            "Share of the base workloads, by times the fastest and by rank",
            *_columns(["", *ranks], shares, left=1),
        ]
    )


def as_rows(found: Standings) -> Iterator[tuple[str, str, str, float]]:
    """One figure a row: score, exact, low, high, time of a workload, ratio, profile at tau, above another."""
    from stretto.measure.algoperf import BASES, WORKLOADS, profile

    for i, name in enumerate(found.submissions):
        low, high = found.intervals[i]
        ends = {"score": found.scores[i], "exact": found.exact[i], "low": low, "high": high}
        yield from ((figure, name, "", float(value)) for figure, value in ends.items())
        shares = profile(found.ratios[i : i + 1], TAUS)[0]
        parts = {
            "time": zip(WORKLOADS, found.times[i]),
            "ratio": zip(BASES, found.ratios[i]),
            "profile": zip(map(str, TAUS), shares),
            "above": zip(found.submissions, found.above[i]),
        }
        for figure, pairs in parts.items():
            yield from ((figure, name, of, float(value)) for of, value in pairs if of != name)


def as_data(found: Standings) -> dict[str, object]:
    """The same for JSON: the figures by submission; a miss, or a workload without logs, is null."""
    submissions: dict[str, dict[str, object]] = {name: {} for name in found.submissions}
    for figure, name, of, value in as_rows(found):
        plain = value if math.isfinite(value) else None
        if of:
            part = submissions[name].setdefault(figure, {})
            assert isinstance(part, dict)
            part[of] = plain
        else:
            submissions[name][figure] = plain
    return {"rule": found.rule, "submissions": submissions, "notes": list(found.notes)}


def _seconds(value: float) -> str:
    return "no logs" if math.isnan(value) else "miss" if math.isinf(value) else f"{value:.0f}"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Aligned lines, the first `left` columns to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in (head, *rows)
    ]
