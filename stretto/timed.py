"""Time inside a compiled graph: layers whose behaviour moves with the run, without recompiling.

Outside the graph time is `At`; inside it is `Clock`, 0-d tensors that are advanced in place between passes.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from stretto.core import At, hash_uniform, mix, stable_hash


class Timed(nn.Module):
    """A layer that must know the time. The Updater advances it before each pass, outside the graph."""

    @abstractmethod
    def advance(self, at: At, row: int = 0, device: torch.device | str = "cpu") -> None:
        """Take note of the time; `row` is the first global row of the coming pass, on `device`."""


class Clock(Timed):
    """Time as plain tensor attributes, for use inside the graph.

    They are no buffers: DDP would broadcast those, `.bfloat16()` round them, `fully_shard` leave them behind.
    """

    fraction: Tensor  # 0-d float32, the share of the run that is done
    seed: Tensor  # 0-d int64, a hash of the run's seed and the step
    row: Tensor  # 0-d int64, the first global row of the coming pass

    def __init__(self) -> None:
        super().__init__()
        self._place("cpu")

    def _place(self, device: torch.device | str) -> None:
        self.fraction = torch.zeros((), device=device)
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.row = torch.zeros((), dtype=torch.int64, device=device)

    def advance(self, at: At, row: int = 0, device: torch.device | str = "cpu") -> None:
        """Set the time in place, so that a compiled graph sees the same tensors with other values."""
        if self.fraction.device != torch.device(device):
            self._place(device)
        self.fraction.fill_(at.fraction)
        self.seed.fill_(stable_hash(at.seed, at.step))
        self.row.fill_(row)

    def uniform(self, name: str, rows: int, k: int = 1) -> Tensor:
        """(rows, k) draws in [0, 1) for the coming pass; each row's own, however the batch is cut."""
        names = torch.arange(rows, device=self.row.device) + self.row
        # `mix`, not `stable_hash`: a compiler reads through the one, and stops at hashlib in the other.
        return hash_uniform(self.seed ^ (mix(*map(ord, name)) >> 1), names, k)
