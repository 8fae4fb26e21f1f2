"""What a race showed, in numbers and sentences, from stored runs only.

Seconds compare inside one sitting only: where a run has none that count, there are steps and the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import caveats
from .outcomes import Outcome, Row
from .power import seeds_needed
from .reading import readable, tunings
from .statistics import Parts, SpeedUp, decompose, figure, geometric_mean, speed_up
from .store import FINISHED, Run, Store

if TYPE_CHECKING:
    from rich.table import Table

Points = list[tuple[int, float | None, float]]  # (step, wall seconds, metric) of each evaluation


@dataclass(frozen=True)
class Result:
    """One run that counts: its steps and seconds to the target, or to its end if it missed."""

    run: str
    seed: int
    state: str
    reached: bool
    steps: int
    before: int | None  # steps at the evaluation before its crossing
    since: float | None  # share of its wall seconds that were over at that evaluation
    fraction: float | None  # of its budget
    wall: float | None
    cpu: float | None
    why: str  # why there are no seconds
    source: str  # "sitting" or "remeasured"
    compile: float  # seconds, not part of wall
    last: float | None  # the metric at the last evaluation
    error: str
    points: Points

    def outcome(self, unit: str, longest: float) -> Outcome:
        """The run as statistics wants it, in "wall", "cpu" or "steps". More time would not have helped a failed one:
        it missed as late as the longest of the runs that it is compared with.
        """
        time = (longest if self.state == "failed" else getattr(self, unit)) or 1e-6
        share = self.before / self.steps if unit == "steps" and self.before else self.since
        return Outcome(self.seed, time, self.reached, time * share if self.reached and share else None)

    def counted(self, unit: str) -> bool:
        """Whether its seconds count in this race; a failed run counts as a miss even without any."""
        return getattr(self, unit) is not None or self.state == "failed"


@dataclass(frozen=True)
class Arm:
    """A contestant's numbers; speed-ups over the reference arm, and none for that arm itself."""

    name: str
    label: str
    short: str
    recipe: dict[str, Any]
    hash: str
    batch: int | None
    budget: int | None  # examples
    parameters: int | None
    memory: int | None  # bytes at the peak
    flops: int | None  # of a step
    results: tuple[Result, ...]
    unfinished: int  # runs interrupted, still running or not found: they count nowhere
    wall: SpeedUp | None = None
    cpu: SpeedUp | None = None
    steps: SpeedUp | None = None
    parts: Parts | None = None

    @property
    def hits(self) -> int:
        """How many runs reached the target."""
        return sum(result.reached for result in self.results)

    @property
    def timed(self) -> bool:
        """Whether every run has seconds that count in this race."""
        return bool(self.results) and all(result.counted("wall") for result in self.results)

    @property
    def why(self) -> str:
        """Why there are only steps."""
        return next((result.why for result in self.results if not result.counted("wall")), "")

    def mean(self, unit: str) -> float | None:
        """Geometric mean of "wall", "cpu" or "steps" to the target; none unless every run reached it."""
        values = [getattr(result, unit) for result in self.results]
        complete = bool(values) and self.hits == len(values) and None not in values
        return geometric_mean(values) if complete else None

    def reached_in(self, unit: str, show: Callable[[float], str]) -> str:
        """The mean, or in words that it was not reached: never a number for a miss."""
        value = self.mean(unit)
        if value is not None:
            return show(value)
        if self.hits == len(self.results):
            return "steps only" if self.results else "no run"
        return "not reached" if not self.hits else f"not reached by {len(self.results) - self.hits}"


@dataclass(frozen=True)
class Summary:
    """What a race showed."""

    race: dict[str, Any]
    arms: tuple[Arm, ...]
    answers: tuple[
        tuple[Arm, str], ...
    ]  # verdicts in sentences, the best first, reference and control left out
    warnings: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def timed(self) -> bool:
        """Whether all runs have seconds that compare."""
        return all(arm.timed for arm in self.arms if arm.results)

    @property
    def goal(self) -> str:
        """The target in words: "loss 2.01"."""
        target, smooth = self.race["target"], self.race.get("smooth", 1)
        if target is None:
            return "the end of its budget"
        return f"{self.race['metric']} {target:g}" + (
            f" (median of {smooth} evaluations)" if smooth > 1 else ""
        )


def summarise(store: Store, race: dict[str, Any]) -> Summary:
    """The numbers of a race from its stored runs; those that cannot be read are named and left out."""
    stored = {run.id: run for run in store.runs(race["workload"])}
    listed = {run for arm in race["arms"] for run in arm["runs"]}
    stored, left_out = readable(run for name, run in stored.items() if name in listed)
    arms = [_arm(race, arm, stored) for arm in race["arms"]]
    reference = next((arm for arm in arms if arm.name == race["reference"]), None)
    if reference and race["target"] is not None:
        arms = [arm if arm is reference else _against(reference, arm) for arm in arms]
    runs = [stored[run] for arm in race["arms"] for run in arm["runs"] if run in stored]
    summary = Summary(race, tuple(arms), (), (), tuple(runs))
    answers = [(arm, _answer(summary, reference, arm)) for arm in arms if arm.name != race.get("control")]
    answers = [answer for answer in answers if answer[0] is not reference or len(answers) == 1]
    answers.sort(key=lambda answer: _rank(answer[0]), reverse=True)
    found = caveats.warnings(replace(summary, answers=tuple(answers)), tunings(store, race["workload"]))
    return replace(summary, answers=tuple(answers), warnings=(*left_out, *found))


def cells(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """The table: its head, and a row of text for each arm."""
    metric = summary.race["metric"]
    head = ["recipe", "reached", f"time to {summary.goal}", "CPU time", "speed-up, wall", "speed-up, CPU"]
    head += ["steps × step cost", "parameters", "peak memory", f"last {metric}"]
    rows = []
    for arm in summary.arms:
        last = [result.last for result in arm.results if result.last is not None]
        row = [arm.label, f"{arm.hits}/{len(arm.results)}"]
        row += [arm.reached_in("wall", seconds), arm.reached_in("cpu", seconds)]
        if arm.name == summary.race["reference"] and summary.race["target"] is not None:
            row += ["reference", "", ""]
        else:
            row += [_verdict(summary, arm.wall), _verdict(summary, arm.cpu)]
            row += [f"{figure(arm.parts[0])} × {figure(arm.parts[1])}" if arm.parts else _steps(arm)]
        row += [count(arm.parameters), size(arm.memory)]
        row += [f"{sum(last) / len(last):.4g}" if last else ""]
        rows.append(row)
    return head, rows


def table(summary: Summary) -> Table:
    """The table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    head, rows = cells(summary)
    drawn = Table(title=f"{summary.race['workload']} to {summary.goal}", title_justify="left")
    for index, name in enumerate(head):
        drawn.add_column(Text(name), justify="left" if index == 0 else "right")
    for row in rows:
        drawn.add_row(*map(Text, row))
    return drawn


def plain(summary: Summary) -> str:
    """The table in Markdown, readable as it stands."""
    head, rows = cells(summary)
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [head, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    text = (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    )
    return "\n".join(text)


# ---- numbers


def _arm(race: dict[str, Any], arm: dict[str, Any], stored: dict[str, Run]) -> Arm:
    finished = [
        run for run in map(stored.get, arm["runs"]) if run and run.record["state"] in (*FINISHED, "failed")
    ]
    found = (_result(race, arm.get("times", {}).get(run.id), run) for run in finished)
    results = tuple(result for result in found if result.steps or result.state == "failed")
    return Arm(
        name=arm["name"],
        label=arm.get("label") or arm["name"],
        short=arm.get("short", ""),
        recipe=arm.get("recipe", {}),
        hash=arm.get("hash", ""),
        batch=arm.get("batch"),
        budget=arm.get("budget"),
        parameters=arm.get("parameters"),
        memory=arm.get("memory"),
        flops=arm.get("flops"),
        results=tuple(sorted(results, key=lambda result: result.seed)),
        unfinished=len(arm["runs"]) - len(results),
    )


def _result(race: dict[str, Any], timing: dict[str, Any] | None, run: Run) -> Result:
    """A run's steps, and its seconds if they may stand beside those of the race's other runs."""
    record, rows, metric = run.record, run.rows(), race["metric"]
    crossing = record.get("crossing") if record["state"] == "target" else None
    end = rows[-1] if rows else {}
    at = next((row for row in rows if row["step"] == crossing["at"]), {}) if crossing else end
    steps = crossing["at"] if crossing else end.get("step", 0)
    clock = record.get("clock") or {}
    own = {unit: at.get(unit) if crossing else clock.get(unit, end.get(unit)) for unit in ("wall", "cpu")}
    here = record.get("sitting") == race.get("sitting")
    if timing is None and here:
        timing = {**own, "source": "sitting"}
    if timing is None or (timing.get("source") == "sitting" and not here):  # it went on elsewhere since
        timing = {"why": "it was trained in another sitting"}
    wall = timing.get("wall")
    scale = wall / own["wall"] if wall and own["wall"] else None  # stored steps at the cost measured now
    return Result(
        run=run.id,
        seed=record["seed"],
        state=record["state"],
        reached=crossing is not None or (race["target"] is None and record["state"] == "done"),
        steps=steps,
        before=crossing["before"] if crossing else None,
        since=_share(rows, crossing) if crossing else None,
        fraction=at.get("fraction"),
        wall=wall,
        cpu=timing.get("cpu"),
        why=timing.get("why") or ("" if wall is not None else "its seconds were not kept"),
        source=timing.get("source") or "",
        compile=clock.get("compile") or 0.0,
        last=end.get(metric),
        error=str(record.get("error") or ""),
        points=[
            (row["step"], row["wall"] * scale if scale and row.get("wall") is not None else None, row[metric])
            for row in rows
            if row.get(metric) is not None
        ],
    )


def _share(rows: Sequence[Row], crossing: dict[str, int]) -> float | None:
    """Of a run's seconds to its crossing, those to the evaluation before; none where a clock was not kept."""
    walls = {row["step"]: row.get("wall") for row in rows}
    before, at = (walls.get(crossing[end]) for end in ("before", "at"))
    return before / at if before and at and before < at else None


def _against(reference: Arm, arm: Arm) -> Arm:
    """The arm with its speed-ups over the reference."""
    if not arm.results or not reference.results:
        return arm

    def ratio(unit: str) -> SpeedUp:
        longest = max(getattr(result, unit) or 0.0 for one in (reference, arm) for result in one.results)
        base, other = ([result.outcome(unit, longest) for result in one.results] for one in (reference, arm))
        return speed_up(base, other)

    parts, timed = None, arm.timed and reference.timed
    if timed and arm.mean("steps") and reference.mean("steps"):
        pairs = [
            ([r.steps for r in one.results], [(r.wall or 0) / r.steps for r in one.results])
            for one in (reference, arm)
        ]
        parts = decompose(*pairs[0], *pairs[1])
    has_cpu = timed and all(r.counted("cpu") for one in (reference, arm) for r in one.results)
    wall, cpu = ratio("wall") if timed else None, ratio("cpu") if has_cpu else None
    return replace(arm, wall=wall, cpu=cpu, steps=ratio("steps"), parts=parts)


# ---- words


def _answer(summary: Summary, reference: Arm | None, arm: Arm) -> str:
    """One arm's verdict as a sentence."""
    goal, seeds = summary.goal, f"{len(arm.results)} seed{'s' * (len(arm.results) != 1)}"
    if not arm.results:
        return f"{arm.label} has no finished run."
    timed = arm.timed and (reference is None or reference.timed)
    unit, show = ("wall", seconds) if timed else ("steps", _in_steps)
    if arm.hits == len(arm.results):
        text = f"{arm.label} reached {goal} in {arm.reached_in(unit, show)}"
    elif arm.hits:
        text = f"{arm.label} reached {goal} in only {arm.hits} of {len(arm.results)} runs"
    else:
        text = f"{arm.label} did not reach {goal} in any of {len(arm.results)} runs"
    if arm.steps is None or reference is None:
        return f"{text} ({seeds})."
    if reference.hits == len(reference.results):
        text += f" where {reference.label} took {reference.reached_in(unit, show)}"
    else:
        missed = len(reference.results) - reference.hits
        text += f"; {reference.label} missed it in {missed} of {len(reference.results)} runs"
    found = arm.wall or arm.steps
    verdict = _verdict(summary, found).replace("] not", "], not").replace(" (no verdict)", ", no verdict")
    text += f": {verdict} ({seeds}, {'wall time' if arm.wall else 'in steps'})."
    if found.method == "aft":
        text += " Runs that missed count as longer than their budget."
    if arm.wall is None:
        text += f" Seconds are not compared: {arm.why or reference.why}."
    if found.verdict == "not resolved" and found.spread and summary.race["target_valid"]:
        needed = seeds_needed(0.05, min(found.spread, 1.0), paired=found.method == "paired")
        text += f" At this spread, about {needed} seeds an arm would resolve a difference of 5 %."
    return text


def _rank(arm: Arm) -> tuple[bool, float]:
    """Arms with seconds before those with steps only, larger speed-ups first."""
    found = arm.wall or arm.steps
    return arm.wall is not None, (found.estimate or found.low) if found else 0.0


def _verdict(summary: Summary, found: SpeedUp | None) -> str:
    if found is None:
        return ""
    return str(found) if summary.race["target_valid"] else f"{found.figures} (no verdict)".strip()


def _steps(arm: Arm) -> str:
    return f"{arm.steps.figures} (steps only)".strip() if arm.steps and not arm.wall else ""


def seconds(value: float) -> str:
    """A duration with the digits that a reader needs: 0.52 s, 2.9 s, 31 s, 3.4 min, 2.1 h."""
    if value < 120:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _in_steps(value: float) -> str:
    return f"{value:.0f} steps"


def count(value: float | None) -> str:
    """1.25 M; empty for none."""
    if value is None:
        return ""
    for size, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """A number of bytes; empty for none."""
    return "" if value is None else f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.1f} GB"
