"""Peak memory of an arm, measured apart: ten steps in a process of its own, above what importing takes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stretto.recipes import Arm
    from stretto.workloads import Workload

STEPS = 10


def peak_memory(workload: type[Workload], arm: Arm) -> int | None:
    """Bytes that ten steps need beyond the imports; None where the system does not tell (other than Linux)."""
    task = pickle.dumps((workload, arm))
    done = subprocess.run([sys.executable, "-m", "stretto.measure.memory"], input=task, capture_output=True)
    return int(done.stdout) if done.returncode == 0 else None


def _status(field: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is what is resident now, VmHWM the most there was."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _measure() -> None:
    from stretto.train import Trainer

    workload, arm = pickle.loads(sys.stdin.buffer.read())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    imported = _status("VmRSS")
    trainer = Trainer(workload(), arm.recipe, batch=arm.batch, budget=arm.budget)
    trainer.advance(STEPS)
    print(_status("VmHWM") - imported)


if __name__ == "__main__":
    _measure()
