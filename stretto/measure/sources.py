"""What a report is made of: the newest race, study or comparison at equal quality of a folder, one by its id, or
runs that belong to none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stretto.measure.equal import EqualSummary, equal_table, summarise_quality
from stretto.measure.outcomes import Interval
from stretto.measure.reading import readable
from stretto.measure.store import Run, Store
from stretto.measure.study_summary import StudySummary, factor, study_table, summarise_study
from stretto.measure.summary import Summary, summarise

NEEDED = ("created", "workload", "metric", "target", "target_valid", "reference", "arms")  # of a stored race
REFERENCE = "baseline"  # of runs that belong to no race, where they have an arm of that name


@dataclass(frozen=True)
class Part:
    """One report: a race, a study or a comparison at equal quality with its race, or runs grouped by arm; `notes`
    say what was left out.
    """

    kind: Literal["race", "study", "quality", "runs"]
    id: str
    created: str
    store: Store
    summary: Summary
    study: StudySummary | None = None
    equal: EqualSummary | None = None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The workload and its goal."""
        race = self.summary.race
        if self.equal:
            return f"{race['workload']}, {race['metric']}: speed-up at equal quality"
        start = f"{race['workload']}, {'time ' if race['target'] is not None else ''}to {self.summary.goal}"
        return f"{start}: a study of {len(self.study.methods)} methods" if self.study else start

    @property
    def sentences(self) -> list[str]:
        """What it showed, the answer first."""
        made = self.study or self.equal
        return made.sentences if made else [sentence for _, sentence in self.summary.answers]

    @property
    def table(self) -> str:
        """What it has beside the table of its race, in Markdown; empty for a race."""
        if self.study and self.study.answers:
            return study_table(self.study)
        return equal_table(self.equal) if self.equal else ""

    @property
    def pairs(self) -> list[tuple[tuple[str, str], Interval | None]]:
        """Each pair of a study's methods, with the factor of its interaction."""
        found = self.study.interactions.items() if self.study else ()
        return [(pair, effect and factor(effect)) for pair, effect in found]

    @property
    def place(self) -> Path:
        """Where its report lies unless another place is asked for, without an ending."""
        folder = {"race": "races", "study": "studies", "quality": "qualities", "runs": "."}[self.kind]
        return self.store.root / folder / self.id


def race_part(store: Store, race_id: str) -> Part:
    """The report of a stored race. ValueError where its record lacks what it is made of."""
    race = store.race(race_id)
    if missing := [key for key in NEEDED if key not in race]:
        raise ValueError(f"race {race_id} in {store.root} lacks {', '.join(missing)}")
    return Part("race", race_id, race["created"], store, summarise(store, race))


def study_part(store: Store, study_id: str) -> Part:
    """The report of a stored study. ValueError where it has not been raced."""
    found = summarise_study(store, store.study(study_id))
    return Part("study", study_id, found.study["created"], store, found.race, found)


def quality_part(store: Store, quality_id: str) -> Part:
    """The report of a stored comparison at equal quality. ValueError where it has not been trained."""
    found = summarise_quality(store, store.quality(quality_id))
    return Part("quality", quality_id, found.record["created"], store, found.race, equal=found)


def find(names: Sequence[str], out: Path) -> tuple[list[Part], list[str]]:
    """A report for each name: a runs folder, one of its workloads' folders, or an id of a race, study or
    quality in `out`; without names, of `out`. Also a sentence for each that has nothing to report.

    ValueError, saying why, where none has.
    """
    parts, failures = [], []
    for name in names or [str(out)]:
        try:
            parts.append(_find(name, out))
        except ValueError as error:
            failures.append(str(error))
    if not parts:
        raise ValueError("; ".join(failures))
    return parts, failures


def _find(name: str, out: Path) -> Part:
    path = Path(name)
    if path.is_dir():
        if not (path / "stretto.json").is_file() and (path.parent / "stretto.json").is_file():
            return runs_part(Store(path.parent, write=False), path.name)
        return newest(Store(path, write=False))
    store = Store(out, write=False)
    makers = _makers(store)
    if name in makers:
        return makers[name](store, name)
    raise ValueError(
        f"{name} is no runs folder, and no race, study or quality of {out}: {', '.join(makers) or 'none'}"
    )


def _makers(store: Store) -> dict[str, Callable[[Store, str], Part]]:
    """How the report of each stored race, study and quality is made."""
    makers: dict[str, Callable[[Store, str], Part]] = dict.fromkeys(store.races(), race_part)
    makers |= dict.fromkeys(store.studies(), study_part)
    return makers | dict.fromkeys(store.qualities(), quality_part)


def newest(store: Store) -> Part:
    """The newest readable race, study or quality of a folder, else its runs; those left out on the way are named."""
    makers = _makers(store)
    notes = []
    for name in sorted(makers, reverse=True):
        try:
            part = makers[name](store, name)
        except ValueError as error:
            notes.append(f"Left out: {error}.")
            continue
        if owner := _owner(store, name):
            part = makers[owner](store, owner)
        return replace(part, notes=(*notes, *part.notes))
    part = runs_part(store)
    return replace(part, notes=(*notes, *part.notes))


def _owner(store: Store, race_id: str) -> str | None:
    """The newest study or quality whose race this is."""
    readers = dict.fromkeys(store.studies(), store.study) | dict.fromkeys(store.qualities(), store.quality)
    for name in sorted(readers, reverse=True):
        try:
            if readers[name](name).get("race") == race_id:
                return name
        except ValueError:  # unreadable: it owns nothing
            continue
    return None


# ---- runs that belong to no race


def runs_part(store: Store, workload: str | None = None) -> Part:
    """The runs of one workload, that with the most unless named, grouped by arm as if they had raced.

    They must share data and target; what does not is named and left out. ValueError where there are none.
    """
    read, notes = readable(store.runs(workload))
    runs = list(read.values())
    if not runs:
        which = f"{store.root} has no readable run" + (f" of {workload}" if workload else "")
        raise ValueError("; ".join([f"{which}; train one with: stretto race stdlib-gpt", *notes]))
    for what, where in (("workload", _workload), ("data", _fingerprint), ("target", _target)):
        runs, others = _majority(runs, where)
        for value, number in others.items():
            shown = f"on data with fingerprint {value}" if what == "data" else f"of {what} {value}"
            each = "1 run" if number == 1 else f"{number} runs"
            verb = "does" if number == 1 else "do"
            notes.append(f"Left out: {each} {shown}, which {verb} not compare with the others.")
    race = _as_race(runs)
    created = f"{len(runs)} runs"
    summary = summarise(store, race)
    return Part("runs", race["workload"], created, store, summary, notes=tuple(notes))


def _majority(runs: list[Run], key: Callable[[Run], Any]) -> tuple[list[Run], Counter[Any]]:
    """The runs that have the commonest value, and how many have each other."""
    counts = Counter(key(run) for run in runs)
    chosen = max(counts, key=lambda value: (counts[value], str(value)))
    del counts[chosen]
    return [run for run in runs if key(run) == chosen], counts


def _workload(run: Run) -> str:
    return run.path.parent.parent.name


def _fingerprint(run: Run) -> str | None:
    return (run.record.get("workload") or {}).get("fingerprint")


def _target(run: Run) -> float | None:
    return (run.record.get("identity") or {}).get("target")


def _as_race(runs: Sequence[Run]) -> dict[str, Any]:
    """A race of these runs as it would be stored; the target is not known to belong to their data."""
    arms: dict[tuple[Any, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.record.get("arm") != REFERENCE, str(run.record.get("arm")))):
        identity = run.record.get("identity") or {}
        parts = (run.record.get("arm") or "unnamed", *map(identity.get, ("recipe_hash", "batch", "budget")))
        arms.setdefault(parts, []).append(run)
    names = _distinct([str(parts[0]) for parts in arms])
    workload = runs[0].record.get("workload") or {}
    sittings = {run.record.get("sitting") for run in runs}
    metric = workload.get("metric", "loss")
    return {
        "id": _workload(runs[0]),
        "workload": _workload(runs[0]),
        "metric": metric,
        "falls": metric == "loss",
        "fingerprint": _fingerprint(runs[0]),
        "target": _target(runs[0]),
        "target_name": None,
        "target_valid": False,
        "target_why": "These runs belong to no race, and nothing stored says that the target was set on their "
        "data, so there is no verdict.",
        "reference": names[0],
        "control": next((name for name in names if name.endswith(" (control)")), None),
        "sitting": sittings.pop() if len(sittings) == 1 else "",
        "order": [],
        "arms": [_as_arm(name, parts, found) for name, (parts, found) in zip(names, arms.items())],
    }


def _as_arm(name: str, parts: tuple[Any, ...], runs: Sequence[Run]) -> dict[str, Any]:
    _, recipe_hash, batch, budget = parts
    return {
        "name": name,
        "recipe": runs[0].record.get("recipe") or {},
        "hash": recipe_hash,
        "batch": batch,
        "budget": budget,
        **{
            key: next(filter(None, (run.record.get(key) for run in runs)), None)
            for key in ("memory", "flops")
        },
        "runs": [run.id for run in runs],
    }


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where several are equal."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
