"""What an arm's steps need, measured apart in a process of its own: peak memory and floating-point operations."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from stretto.recipes import Arm
    from stretto.train import Trainer
    from stretto.workloads import Workload

STEPS = 10  # whose peak of memory is looked at
COUNTED = 5  # steps, spread over a run, whose operations are counted


class Footprint(NamedTuple):
    """What the steps of an arm need; none where it could not be found out, memory on systems other than Linux."""

    memory: int | None  # bytes at the peak, beyond what importing takes
    flops: int | None  # of a step on average: products, convolutions and attention


UNKNOWN = Footprint(None, None)


def footprint(workload: type[Workload], arm: Arm) -> Footprint:
    """Take an arm's first steps in a process of its own; nothing is known where that fails."""
    task = pickle.dumps((workload, arm))
    command, environment = [sys.executable, "-m", "stretto.measure.footprint"], {**os.environ, **imports()}
    done = subprocess.run(command, input=task, capture_output=True, env=environment)
    return Footprint(*json.loads(done.stdout)) if done.returncode == 0 else UNKNOWN


def imports() -> dict[str, str]:
    """The environment in which a process can import what this one can: the workload may be the user's own."""
    return {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}


def count_flops(trainer: Trainer) -> int:
    """Operations of a step, the mean of some over the run, with those of its optimizer; it trains the model."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    aten = torch.ops.aten  # torch counts attention on GPUs alone
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    total = 0
    for k in range(COUNTED):
        trainer.seek(trainer.plan.steps * k // COUNTED)
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            trainer.advance(1)
        total += counter.get_total_flops()
    return round(total / COUNTED)


def _status(field: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is what is resident now, VmHWM the most there was."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _measure() -> None:
    from stretto.train import Trainer

    workload, arm = pickle.loads(sys.stdin.buffer.read())
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
        imported = _status("VmRSS")
    except OSError:  # another system, or one that does not tell
        imported = None
    trainer = Trainer(workload(), arm.recipe, batch=arm.batch, budget=arm.budget)
    trainer.advance(STEPS)
    memory = None if imported is None else _status("VmHWM") - imported
    print(json.dumps(Footprint(memory, count_flops(trainer))))


if __name__ == "__main__":
    _measure()
