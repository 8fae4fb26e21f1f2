"""What a report is made of: the newest race or study of a folder, one by its id, or runs that belong to none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stretto.measure.outcomes import Interval
from stretto.measure.reading import readable
from stretto.measure.store import Run, Store
from stretto.measure.study_summary import StudySummary, factor, summarise_study
from stretto.measure.summary import Summary, summarise

NEEDED = ("created", "workload", "metric", "target", "target_valid", "reference", "arms")  # of a stored race
REFERENCE = "baseline"  # of runs that belong to no race, where they have an arm of that name


@dataclass(frozen=True)
class Part:
    """One report: a race, a study with its race, or runs grouped by arm; `notes` say what was left out."""

    kind: Literal["race", "study", "runs"]
    id: str
    created: str
    store: Store
    summary: Summary
    study: StudySummary | None = None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The workload and its goal."""
        race = self.summary.race
        start = f"{race['workload']}, {'time ' if race['target'] is not None else ''}to {self.summary.goal}"
        return f"{start}: a study of {len(self.study.methods)} methods" if self.study else start

    @property
    def pairs(self) -> list[tuple[tuple[str, str], Interval | None]]:
        """Each pair of a study's methods, with the factor of its interaction."""
        found = self.study.interactions.items() if self.study else ()
        return [(pair, effect and factor(effect)) for pair, effect in found]

    @property
    def place(self) -> Path:
        """Where its report lies unless another place is asked for, without an ending."""
        folder = {"race": "races", "study": "studies", "runs": "."}[self.kind]
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


def find(names: Sequence[str], out: Path) -> tuple[list[Part], list[str]]:
    """A report for each name: a runs folder, one of its workloads' folders, or an id of a race or study in
    `out`; without names, of `out`. Also a sentence for each that has nothing to report.

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
    if name in store.studies():
        return study_part(store, name)
    if name in store.races():
        return race_part(store, name)
    known = [*store.races(), *store.studies()]
    raise ValueError(f"{name} is no runs folder, and no race or study of {out}: {', '.join(known) or 'none'}")


def newest(store: Store) -> Part:
    """The newest readable race or study of a folder, else its runs; those left out on the way are named."""
    makers: dict[str, Callable[[Store, str], Part]] = dict.fromkeys(store.races(), race_part)
    makers |= dict.fromkeys(store.studies(), study_part)
    notes = []
    for name in sorted(makers, reverse=True):
        try:
            part = makers[name](store, name)
        except ValueError as error:
            notes.append(f"Left out: {error}.")
            continue
        owner = next((study for study in reversed(store.studies()) if _race_of(store, study) == name), None)
        if owner:
            part = study_part(store, owner)
        return _noted(part, notes)
    return _noted(runs_part(store), notes)


def _race_of(store: Store, study_id: str) -> str | None:
    try:
        return store.study(study_id).get("race")
    except ValueError:
        return None


def _noted(part: Part, notes: Sequence[str]) -> Part:
    return Part(part.kind, part.id, part.created, part.store, part.summary, part.study, (*notes, *part.notes))


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
    return Part("runs", race["workload"], created, store, summary, None, tuple(notes))


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
        "memory": next((run.record["memory"] for run in runs if run.record.get("memory")), None),
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
