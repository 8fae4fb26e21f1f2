"""A byte-level GPT on the source of Python's standard library: 10 MB of real text on every machine."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stretto.core import Forward
from stretto.data import TokenWindows
from stretto.models.gpt import GPT, next_token_loss
from stretto.workloads.workload import Workload

LENGTH = 128  # bytes in a window
VALID_WINDOWS = 64  # of the validation split, drawn once for all runs
LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
)


def source_files(root: Path) -> list[Path]:
    """The standard library's source files in a fixed order, tests and tables left out."""
    found = (path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts[:-1]))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


@cache
def read_splits(root: Path) -> tuple[dict[str, Tensor], str]:
    """Bytes of the splits (files joined by a zero byte; every 20th file, by hash of its name, validates)."""
    parts: dict[str, list[bytes]] = {"train": [], "valid": []}
    print_of_all = hashlib.sha256()
    for path in source_files(root):
        name = path.relative_to(root).as_posix()
        text = path.read_bytes()
        print_of_all.update(name.encode() + b"\0" + hashlib.sha256(text).digest())
        chosen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        parts["valid" if chosen else "train"].append(text)
    if not all(parts.values()):
        raise ValueError(
            f"no source files of the standard library under {root}; this Python ships without them"
        )
    splits = {
        split: torch.frombuffer(bytearray(b"\0".join(texts)), dtype=torch.uint8)
        for split, texts in parts.items()
    }
    return splits, print_of_all.hexdigest()[:12]


class StdlibGPT(Workload):
    """Next-byte prediction by a GPT of 0.9 M parameters; loss in nats a byte on held-out files."""

    name = "stdlib-gpt"
    batch = 4
    budget = 2400
    metric = "loss"
    targets = {"baseline": 2.3747, "modern": 2.1344}
    measured_on = "52afbbbc8d8e"
    tokens_per_example = LENGTH

    def __init__(self) -> None:
        self._splits, self._fingerprint = read_splits(Path(sysconfig.get_paths()["stdlib"]))

    @property
    def fingerprint(self) -> str:
        """A hash of the names and bytes of the source files."""
        return self._fingerprint

    def data(self, split: Literal["train", "valid"]) -> TokenWindows:
        """Windows of 128 bytes."""
        return TokenWindows(self._splits[split], LENGTH)

    def model(self) -> nn.Module:
        """GPT-2 in small: 4 blocks, 4 heads, width 128."""
        return GPT(vocabulary=256, length=LENGTH, width=128, depth=4, heads=4)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each byte."""
        return next_token_loss(outputs, targets)

    def evaluate(self, predict: Forward) -> dict[str, float]:
        """Mean loss over 64 windows of the held-out files, always the same ones."""
        inputs, targets = self._valid_windows()
        losses = [next_token_loss(predict(x), y).mean() for x, y in zip(inputs.split(32), targets.split(32))]
        return {"loss": float(torch.stack(losses).mean())}

    def _valid_windows(self) -> tuple[Tensor, Tensor]:
        data = self.data("valid")
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:VALID_WINDOWS]
        return data.take(chosen)
