"""Examples as tensors in memory: a batch is one gather."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset


class Arrays(Dataset[tuple[Tensor, Tensor]]):
    """Inputs (N, ...) and targets (N, ...), on one device."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs and {len(targets)} targets; give one target an input")
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """A batch: index (n,) int64 -> inputs (n, ...), targets (n, ...)."""
        return self.inputs[index], self.targets[index]
