"""Save and load a run's state: a checkpoint is complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """Write aside, then rename: a kill at any moment leaves the old checkpoint or the new one."""
    aside = path.with_suffix(".partial")
    with open(aside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load(path: Path) -> dict[str, Any] | None:
    """The state, or None where there is no complete checkpoint."""
    return torch.load(path, weights_only=True) if path.exists() else None
