"""What a race and a single run record alike: which run it is, how it begins, its evaluations, its clock."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stretto.measure.clock import Stopwatch
from stretto.measure.store import SCHEMA
from stretto.train import Trainer
from stretto.train.parallel import Execution

if TYPE_CHECKING:
    from stretto.recipes import Arm
    from stretto.workloads import Workload

ALONE = Execution()


def identify(
    workload: Workload,
    arm: Arm,
    seed: int,
    target: float | None,
    *,
    replicate: int = 0,
    execution: Execution = ALONE,
    slices: int = 1,
) -> dict[str, Any]:
    """Everything that can change a run's outcome. Ranks cannot: those that share slices give the same sums."""
    from stretto import __version__

    executed: dict[str, Any] = {
        "device": execution.place.type, "threads": torch.get_num_threads(), "precision": execution.precision,
        "compile": execution.compile, "parallel": execution.parallel,
    }  # fmt: skip
    if slices > 1:  # its threads are the launcher's choice, and change with the number of ranks
        executed |= {"threads": None, "slices": slices}
    return {
        "workload": workload.name,
        "fields": workload.fields(),
        "recipe_hash": arm.recipe.hash,
        "batch": arm.batch or workload.batch,
        "budget": arm.budget or workload.budget,
        "target": target,
        "seed": seed,
        "replicate": replicate,
        "execution": executed,
        "versions": {"torch": torch.__version__, "stretto": __version__},
    }  # fmt: skip


def first_record(
    identity: dict[str, Any], workload: Workload, arm: Arm, label: str, sitting: str | None
) -> dict[str, Any]:
    """The record of a run that begins."""
    return {
        "schema": SCHEMA, "sitting": sitting, "workload": workload.fields(), "recipe": arm.recipe.to_json(),
        "budget": identity["budget"], "seed": identity["seed"], "arm": label,
        "execution": identity["execution"], "versions": identity["versions"], "machine": machine(),
        "state": "running", "error": None, "crossing": None, "clock": None, "memory": None, "flops": None,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What this machine is, for the record."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def seconds(watch: Stopwatch) -> dict[str, float]:
    """What a checkpoint keeps of a clock."""
    return {"wall": watch.wall, "cpu": watch.cpu}


def clock(watch: Stopwatch) -> dict[str, float]:
    """What a record keeps of a clock."""
    return {**seconds(watch), "compile": 0.0}


def marks(trainer: Trainer) -> set[int]:
    """The steps after which a run is evaluated."""
    count = max(1, round(1 / trainer.workload.eval_every))
    return {math.ceil(trainer.plan.steps * k / count) for k in range(1, count + 1)}


def evaluation(trainer: Trainer, watch: Stopwatch) -> dict[str, Any]:
    """Evaluate, off the clock: a row of metrics.jsonl."""
    at = trainer.plan.at(trainer.step)
    examples = trainer.update.examples  # those that a selection left out are not counted
    tokens = examples * at.tokens_per_example if at.tokens_per_example else None
    return {
        "step": at.step, "fraction": at.fraction, **seconds(watch),
        "examples": examples, "tokens": tokens, "train_loss": trainer.loss, **trainer.evaluate(),
    }  # fmt: skip
