"""What a workload is: model, data, loss, metric, target, batch size and budget, in one class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from stretto.core import Forward


class Workload(ABC):
    """A task to be trained to a target. Targets belong to the data they were measured on."""

    name: ClassVar[str]
    batch: ClassVar[int]  # examples a step, unless an arm has its own
    budget: ClassVar[int]  # examples of a whole run, unless an arm has its own
    metric: ClassVar[Literal["loss", "accuracy"]]
    eval_every: float = 0.05  # share of a run between evaluations
    smooth: int = 1  # evaluations whose median is held against the target
    targets: ClassVar[dict[str, float]]  # the first is the default
    measured_on: ClassVar[str]  # fingerprint of the data on which the targets were measured
    tokens_per_example: ClassVar[int | None] = None

    @property
    def falls(self) -> bool:
        """Whether a better metric is a lower one."""
        return self.metric == "loss"

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the data that was found."""

    @abstractmethod
    def data(self, split: Literal["train", "valid"]) -> Any:
        """The data set of a split, with `take(index)` for whole batches."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh model, initialised from torch's present random stream."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Per-example losses."""

    @abstractmethod
    def evaluate(self, predict: Forward) -> dict[str, float]:
        """Metrics on the validation split."""

    def fields(self) -> dict[str, Any]:
        """All that can change a run's outcome, for its identity."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "metric": self.metric,
            "eval_every": self.eval_every,
            **({"smooth": self.smooth} if self.smooth > 1 else {}),
        }
