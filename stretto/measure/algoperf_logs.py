"""AlgoPerf's workloads and logs: when each trial first reached its target, from a log tree or from one table."""

from __future__ import annotations

import csv
import gzip
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

TABLES = ("evaluations.csv.gz", "evaluations.csv")
COLUMNS = ("submission", "workload", "study", "trial", "time_s", "value")
LOG = "eval_measurements.csv"
CLOCK = "accumulated_submission_time"

Evaluation = tuple[float, float]  # training seconds until it, and the metric on the validation split


class Target(NamedTuple):
    """What a workload asks for on its validation split, and the base workload that it is a variant of."""

    metric: str
    value: float
    base: str

    @property
    def falls(self) -> bool:
        """Whether less is better."""
        return self.metric in ("loss", "wer")


# Version 0.5: validation_target_value in the workloads of github.com/mlcommons/algorithmic-efficiency, as
# frozen in scoring/workload_targets_v05.json of github.com/mlcommons/submissions_algorithms. Bases first.
WORKLOADS = {
    "criteo1tb": Target("loss", 0.123735, "criteo1tb"),
    "fastmri": Target("ssim", 0.723653, "fastmri"),
    "imagenet_resnet": Target("accuracy", 0.77431, "imagenet_resnet"),
    "imagenet_vit": Target("accuracy", 0.77309, "imagenet_vit"),
    "librispeech_conformer": Target("wer", 0.085884, "librispeech_conformer"),
    "librispeech_deepspeech": Target("wer", 0.119936, "librispeech_deepspeech"),
    "ogbg": Target("mean_average_precision", 0.28098, "ogbg"),
    "wmt": Target("bleu", 30.8491, "wmt"),
    "criteo1tb_embed_init": Target("loss", 0.129657, "criteo1tb"),
    "fastmri_tanh": Target("ssim", 0.71784, "fastmri"),
    "imagenet_resnet_large_bn_init": Target("accuracy", 0.76526, "imagenet_resnet"),
    "librispeech_conformer_layernorm": Target("wer", 0.09731, "librispeech_conformer"),
    "ogbg_model_size": Target("mean_average_precision", 0.269446, "ogbg"),
    "wmt_glu_tanh": Target("bleu", 29.5779, "wmt"),
}
BASES = [name for name, target in WORKLOADS.items() if target.base == name]


class Trial(NamedTuple):
    """Whose trial it is."""

    submission: str
    workload: str
    study: int
    trial: int


class Hit(NamedTuple):
    """The first evaluation at the target: how many came before it, and its seconds; both infinite in a miss."""

    before: float
    time: float


MISS = Hit(math.inf, math.inf)


@dataclass
class Logs:
    """What was read: every trial, and what a reader must know of the rest, a line each."""

    hits: dict[Trial, Hit] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    nans: Counter[str] = field(default_factory=Counter)  # evaluations by submission
    unknown: set[str] = field(default_factory=set)  # workloads

    def take(self, trial: Trial, evaluations: Sequence[Evaluation]) -> None:
        """Add a trial: its first evaluation at the target is its hit. NaN is at no target."""
        if trial.workload not in WORKLOADS:
            self.unknown.add(trial.workload)
            return
        target = WORKLOADS[trial.workload]
        at, sign = target.value, -1 if target.falls else 1
        hits = (Hit(i, time) for i, (time, value) in enumerate(evaluations) if sign * value >= sign * at)
        self.hits[trial] = next(hits, MISS)
        self.nans[trial.submission] += sum(value != value for _, value in evaluations)

    def closed(self) -> Logs:
        """With a line for what was counted on the way."""
        if self.unknown:
            self.notes.append(f"not of version 0.5, left out: {', '.join(sorted(self.unknown))}")
        if told := ", ".join(f"{name} {count}" for name, count in sorted(self.nans.items()) if count):
            self.notes.append(f"evaluations that are NaN, which reach no target: {told}")
        return self


def read(path: Path) -> Logs:
    """All trials under a folder of logs, or in a table; a torn row is left out and noted.

    A table has the columns submission, workload, study, trial, time_s and value, its rows in the order of
    evaluation, and is named or lies in the folder as evaluations.csv or evaluations.csv.gz. Logs lie in
    SUBMISSION/study_K/WORKLOAD/trial_K. ValueError where there is neither.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder of AlgoPerf logs, or a table of them")
    table = next((path / name for name in TABLES if (path / name).is_file()), None)
    if path.is_file() or table:
        return _read_table(table or path)
    return _read_tree(path)


def _read_table(path: Path) -> Logs:
    logs, runs = Logs(), defaultdict[tuple[str, ...], list[Evaluation]](list)
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        for key, evaluation in _rows(file, path, COLUMNS, logs):
            runs[key].append(evaluation)
    for (submission, workload, study, number), evaluations in runs.items():
        if not (study.isdecimal() and number.isdecimal()):
            raise ValueError(f"{path}: study {study!r} and trial {number!r} must be whole numbers")
        logs.take(Trial(submission, workload, int(study), int(number)), evaluations)
    if not logs.hits:
        raise ValueError(f"{path} has no evaluation of an AlgoPerf workload ({', '.join(BASES)})")
    return logs.closed()


def _read_tree(root: Path) -> Logs:
    logs = Logs()
    for folder in sorted(root.glob("**/trial_*")):
        trial, evaluations = _whose(root, folder), list[Evaluation]()
        if trial is None:
            continue
        if trial.workload in WORKLOADS:
            columns = (CLOCK, f"validation/{WORKLOADS[trial.workload].metric}")
            try:
                with (folder / LOG).open(newline="") as file:
                    evaluations += [evaluation for _, evaluation in _rows(file, folder / LOG, columns, logs)]
            except FileNotFoundError:
                logs.notes.append(f"{folder} has no {LOG}: a miss")
            except ValueError as error:
                logs.notes.append(f"{error}: a miss")
        logs.take(trial, evaluations)
    if not logs.hits:
        raise ValueError(
            f"{root} holds no AlgoPerf logs; they lie in SUBMISSION/study_0/WORKLOAD_pytorch/trial_1/{LOG}"
        )
    return logs.closed()


def _whose(root: Path, folder: Path) -> Trial | None:
    """SUBMISSION/study_K/WORKLOAD_jax/trial_K; studies may be left out, or lie under the workload."""
    number = re.fullmatch(r"trial_(\d+)", folder.name)
    if number is None:
        return None
    parts = list(folder.relative_to(root).parts[:-1])
    studies = [part for part in parts if re.fullmatch(r"study_\d+", part)]
    *owner, workload = [part for part in parts if part not in studies] or [root.name]
    study = int(studies[-1].removeprefix("study_")) if studies else 0
    workload = re.sub("_(jax|pytorch)$", "", workload)
    return Trial("/".join(owner) or root.name, workload, study, int(number[1]))


def _rows(
    file: IO[str], path: Path, columns: tuple[str, ...], logs: Logs
) -> Iterator[tuple[tuple[str, ...], Evaluation]]:
    """The named columns of each row, the last two as numbers; a row that is torn becomes a note."""
    reader = csv.reader(file)
    try:
        head = next(reader, [])
        if missing := [name for name in columns if name not in head]:
            raise ValueError(f"{path} has no column {', '.join(missing)}")
        *places, clock, metric = [head.index(name) for name in columns]
        for row in reader:
            if len(row) == len(head) and (evaluation := _evaluation(row[clock], row[metric])):
                yield tuple([row[place] for place in places]), evaluation
            else:
                logs.notes.append(f"{path}, line {reader.line_num} is torn or holds no numbers: left out")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        logs.notes.append(f"{path} ends in the middle, after line {reader.line_num}")


def _evaluation(seconds: str, value: str) -> Evaluation | None:
    """Two numbers, the second NaN where there is nothing, which is how pandas writes it; none if they are not."""
    try:
        return float(seconds), float(value or "nan")
    except ValueError:
        return None
