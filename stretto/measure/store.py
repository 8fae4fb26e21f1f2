"""Runs on disk, named by content: an equal run is found again, a changed one never reuses an old folder.

All of it is JSON that any tool reads: `run.json` is replaced as a whole, `metrics.jsonl` grows by lines.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
FINISHED = ("target", "done")  # states of a run whose outcome is known
ENDED = (*FINISHED, "failed")
KINDS = {  # folders of what is made of runs
    "races": "race", "studies": "study", "qualities": "quality", "tunings": "tuning",
}  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_id(identity: dict[str, Any]) -> str:
    """Name of a run: 12 hex digits of a hash of everything that can change its outcome."""
    return _hash(identity)[:12]


class Run:
    """One training on disk: `record` is its run.json, `rows()` its evaluations."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record

    @property
    def id(self) -> str:
        """The run's name, which is its folder's."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / "checkpoints"

    def update(self, **fields: Any) -> None:
        """Merge `fields` into the record and rewrite run.json, which a kill never tears."""
        self.record = _plain({**self.record, **fields})
        _write(self.path / "run.json", self.record)

    def append(self, row: dict[str, Any]) -> None:
        """Add one evaluation, on disk when this returns. A row holds `step` and numbers; NaN becomes null.

        One write of one line, so a kill tears at most this line; a line torn before is closed first.
        """
        line = (json.dumps(_plain(row), allow_nan=False) + "\n").encode()
        descriptor = os.open(self.path / "metrics.jsonl", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(descriptor, line) != len(line):
                raise OSError(
                    errno.ENOSPC, "the disk took only part of a row", str(self.path / "metrics.jsonl")
                )
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rows(self) -> list[dict[str, Any]]:
        """All readable evaluations by step: torn lines are left out, of equal steps the later line counts."""
        try:
            lines = (self.path / "metrics.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        rows: dict[int, dict[str, Any]] = {}
        for line in lines:
            try:
                row = json.loads(line)
                rows[row["step"]] = row
            except (ValueError, TypeError, KeyError):  # torn by a kill
                continue
        return [rows[step] for step in sorted(rows)]


class WatchedRun(Run):
    """A run that another rank records: what this one has to say of it is not written."""

    def update(self, **fields: Any) -> None:
        """Merge `fields` into the record here."""
        self.record = _plain({**self.record, **fields})

    def append(self, row: dict[str, Any]) -> None:
        """Nothing."""


class Store:
    """A folder of runs: `<workload>/<recipe hash>/<run id>/`, and of what is made of them: `races/<id>.json`,
    `studies/<id>.json`, `qualities/<id>.json`, `tunings/<id>.json`.

    Opening one for writing creates it and tries a file in it, so that a race fails before it trains.
    ValueError if it cannot be read or written, or belongs to another schema.
    """

    def __init__(self, root: str | os.PathLike[str], write: bool = True) -> None:
        self.root = Path(root)
        stamp = self.root / "stretto.json"
        if write:
            probe = self.root / f".probe-{os.getpid()}"
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                probe.write_bytes(b"")
                probe.unlink()
                if not stamp.exists():
                    _write(stamp, {"schema": SCHEMA})
            except OSError as error:
                raise ValueError(
                    f"the runs folder {self.root} cannot be written ({error.strerror}); "
                    "make it writable or choose another with --out"
                ) from error
        elif not stamp.is_file():
            raise ValueError(f"{self.root} is no runs folder (it has no stretto.json); name one with --out")
        try:
            schema = json.loads(stamp.read_bytes())["schema"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"the runs folder {self.root} has an unreadable stretto.json; choose another with --out"
            ) from error
        if schema != SCHEMA:
            raise ValueError(
                f"the runs folder {self.root} has schema {schema}, this version writes {SCHEMA}; "
                "choose another with --out"
            )

    @classmethod
    def open(cls, root: str | os.PathLike[str], write: bool = True) -> Store:
        """The same as `Store(root, write)`."""
        return cls(root, write)

    def create(self, identity: dict[str, Any], record: dict[str, Any]) -> Run:
        """Start a run from its first record; what an unfinished run of this identity left is replaced.

        `identity` holds at least "workload" and "recipe_hash". ValueError where a finished run is stored.
        """
        found = self.find(identity)
        if found and found.record.get("state") in FINISHED:
            raise ValueError(f"run {found.id} is stored already, as {found.record['state']}; use find()")
        path = self._path(identity)
        path.mkdir(parents=True, exist_ok=True)
        (path / "metrics.jsonl").unlink(missing_ok=True)
        run = Run(path, {"schema": SCHEMA, "id": path.name, "identity": identity})
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        run.update(**record)
        return run

    def find(self, identity: dict[str, Any]) -> Run | None:
        """The stored run of this identity, finished or not."""
        return _read_run(self._path(identity))

    def run(self, run_id: str) -> Run:
        """The run of this name; ValueError if there is none."""
        for run in self.runs():
            if run.id == run_id:
                return run
        raise ValueError(f"no readable run {run_id} in {self.root}")

    def runs(self, workload: str | None = None) -> list[Run]:
        """All runs (of one workload) by name; folders without a readable run.json are left out."""
        paths = (path.parent for path in self.root.glob("*/*/*/run.json"))
        runs = (_read_run(path) for path in paths if workload in (None, path.parent.parent.name))
        return sorted((run for run in runs if run), key=lambda run: run.id)

    def save_race(self, race: dict[str, Any]) -> str:
        """Write a race and return its id: its own "id" if it has one, so that saving again replaces it."""
        return self._save("races", race)

    def race(self, race_id: str) -> dict[str, Any]:
        """A stored race; ValueError if there is none of this id, or it is unreadable."""
        return self._load("races", race_id)

    def races(self) -> list[str]:
        """The ids of all stored races, the newest last."""
        return self._ids("races")

    def save_study(self, study: dict[str, Any]) -> str:
        """Write a study and return its id, as `save_race` does."""
        return self._save("studies", study)

    def study(self, study_id: str) -> dict[str, Any]:
        """A stored study; ValueError if there is none of this id, or it is unreadable or of another schema."""
        return self._load("studies", study_id)

    def studies(self) -> list[str]:
        """The ids of all stored studies, the newest last."""
        return self._ids("studies")

    def save_quality(self, quality: dict[str, Any]) -> str:
        """Write a comparison at equal quality and return its id, as `save_race` does."""
        return self._save("qualities", quality)

    def quality(self, quality_id: str) -> dict[str, Any]:
        """A stored comparison at equal quality; ValueError as for `study`."""
        return self._load("qualities", quality_id)

    def qualities(self) -> list[str]:
        """The ids of all stored comparisons at equal quality, the newest last."""
        return self._ids("qualities")

    def save_tuning(self, tuning: dict[str, Any]) -> str:
        """Write a tuning and return its id, as `save_race` does."""
        return self._save("tunings", tuning)

    def _save(self, kind: str, value: dict[str, Any]) -> str:
        now = datetime.now(UTC)
        name: str = value.get("id") or f"{now:%Y%m%d-%H%M%S-%f}-{_hash(value)[:6]}"
        (self.root / kind).mkdir(exist_ok=True)
        defaults = {"schema": SCHEMA, "created": now.isoformat(timespec="seconds")}
        _write(self.root / kind / f"{name}.json", {**defaults, **value, "id": name})
        return name

    def _load(self, kind: str, name: str) -> dict[str, Any]:
        one = KINDS[kind]
        if name not in self._ids(kind):
            has = ", ".join(self._ids(kind)) or "none"
            raise ValueError(f"no {one} {name} in {self.root}; it has {has}")
        try:
            value: dict[str, Any] = json.loads((self.root / kind / f"{name}.json").read_bytes())
        except ValueError as error:
            raise ValueError(f"{one} {name} in {self.root} is unreadable: {error}") from error
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"{one} {name} in {self.root} has schema {schema}, this version reads {SCHEMA}; "
                "read it with the version that wrote it"
            )
        return value

    def _ids(self, kind: str) -> list[str]:
        return sorted(path.stem for path in (self.root / kind).glob("*.json") if path.name[0] != ".")

    def _path(self, identity: dict[str, Any]) -> Path:
        workload, recipe = str(identity["workload"]), str(identity["recipe_hash"])
        for name in (workload, recipe):
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                raise ValueError(f"{name!r} cannot name a folder; use letters, digits, dots and dashes")
        return self.root / workload / recipe / run_id(identity)


@contextmanager
def stopping_clearly(root: Path) -> Iterator[None]:
    """Within it, a disk that is full is a ValueError that says so, and what is stored stays readable."""
    try:
        yield
    except BaseException as error:
        if not any(isinstance(one, OSError) and one.errno in FULL for one in _causes(error)):
            raise
        raise ValueError(
            f"the disk of {root} is full; make room and give the same command again, it goes on from "
            "what is stored"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error with what led to it; torch's checkpoints keep that in a dict of their own."""
    yield error
    held = [pair[0] for pair in getattr(error, "failures", {}).values()]
    for cause in (error.__cause__, error.__context__, *held):
        if cause is not None:
            yield from _causes(cause)


def _read_run(path: Path) -> Run | None:
    try:
        record = json.loads((path / "run.json").read_bytes())
    except (OSError, ValueError):
        return None
    return Run(path, record) if isinstance(record, dict) else None


def _write(path: Path, value: dict[str, Any]) -> None:
    """Replace a file as a whole: a reader, or a kill, finds the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(_plain(value), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _hash(value: Any) -> str:
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """What any JSON reader understands: scalars of arrays as numbers, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
