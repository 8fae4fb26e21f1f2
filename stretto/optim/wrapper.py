"""What optimizers around other optimizers share: groups, one state_dict, and a place before and after the step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from stretto.optim.exchange import local

Stepping = list[
    tuple[dict[str, Any], list[Tensor]]
]  # each group with those of its parameters that have a gradient


class Wrapper(Optimizer):
    """An optimizer around another one.

    Groups are the other's own, so that schedules and hyperparameters that change reach both. What a wrapper
    keeps of a parameter is in `state` under the names in `kept`, in float32 or better; numbers are in groups.
    `state_dict` holds the state of both in torch's form. A GradScaler that finds no finite gradients skips
    the step of both.
    """

    kept: ClassVar[tuple[str, ...]] = ()  # the names of what it keeps, none of them the other's

    def __init__(self, optimizer: Optimizer, **hyperparameters: float) -> None:
        super().__init__(optimizer.param_groups, {**optimizer.defaults, **hyperparameters})
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    @abstractmethod
    def around(self, stepping: Stepping) -> AbstractContextManager[None]:
        """What happens before and after the other's step, a context manager."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the other, and what is around it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = ((g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups)
        with self.around([(group, params) for group, params in found if params]):
            self.optimizer.step()
        return loss

    def keep(self, params: list[Tensor], name: str, *, zero: bool = False) -> list[Tensor]:
        """What is kept of these parameters under a name, this rank's shards; at first a copy of each, or zeros."""
        for p in params:
            if name not in self.state[p]:
                exact = torch.promote_types(p.dtype, torch.float32)
                values = torch.zeros_like(p) if zero else p.detach()
                self.state[p][name] = values.to(exact, copy=True)
        return [local(self.state[p][name]) for p in params]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the other one more group."""
        if hasattr(self, "optimizer"):
            self.optimizer.add_param_group(param_group)
            self._share_groups()
        else:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The other's, with what is kept of each parameter beside its own."""
        theirs = self.optimizer.state_dict()
        state = dict(theirs["state"])
        for index, kept in super().state_dict()["state"].items():
            state[index] = state.get(index, {}) | kept
        return {**theirs, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; from one of the other alone, begin anew around it."""
        theirs: dict[int, dict[str, Any]] = {}
        mine: dict[int, dict[str, Tensor]] = {}
        for index, entry in state_dict["state"].items():
            for name, value in entry.items():
                (mine if name in self.kept else theirs).setdefault(index, {})[name] = value
        self.optimizer.load_state_dict({**state_dict, "state": theirs})
        self._share_groups()
        self.state.clear()
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for p, index in zip(group["params"], saved["params"]):
                if index in mine:
                    self.state[p] = {name: value.to(p.device) for name, value in mine[index].items()}

    def _share_groups(self) -> None:
        self.param_groups = self.optimizer.param_groups
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**super().__getstate__(), **own}


def shards(params: list[Tensor]) -> list[Tensor]:
    """This rank's part of each: torch's foreach functions plan DTensors anew at each call, or refuse them."""
    return [local(p) for p in params]


def like(values: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The values in the dtypes of the others; nothing is copied where they agree."""
    if all(value.dtype == other.dtype for value, other in zip(values, others)):
        return values
    return [value.to(other.dtype) for value, other in zip(values, others)]
