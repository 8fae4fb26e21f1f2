"""Averages of iterates around any optimizer: Schedule-Free, primal averaging, EMA-Nesterov, Lookahead.

The optimizer inside steps from where the gradient was taken, its weight decay included. Parameters without a
gradient stay as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stretto.optim.wrapper import Stepping, Wrapper, like, shards


class Averaging(Wrapper):
    """Gradients at y, between an iterate z, which takes the steps, and its average x, which is for evaluation.

    y = (1 - interpolation) z + interpolation x; z += the optimizer's step from y; x += share (z - x). The
    parameters hold y. `interpolation` is in each group.
    """

    kept = ("z", "x")

    def __init__(self, optimizer: Optimizer, interpolation: float = 0.9, **hyperparameters: float) -> None:
        if not 0 <= interpolation <= 1:
            raise ValueError(f"interpolation is {interpolation}; it must lie in [0, 1]")
        super().__init__(optimizer, interpolation=interpolation, **hyperparameters)

    @abstractmethod
    def share(self, group: dict[str, Any]) -> float:
        """The share of the present iterate in its average."""

    @contextmanager
    def around(self, stepping: Stepping) -> Iterator[None]:
        """Move z by the step that was taken from y, then x towards z, then y between them."""
        for _, params in stepping:
            self.keep(params, "x")
            torch._foreach_sub_(self.keep(params, "z"), shards(params))
        yield
        for group, params in stepping:
            z, x, weights = self.keep(params, "z"), self.keep(params, "x"), shards(params)
            torch._foreach_add_(z, weights)
            torch._foreach_lerp_(x, z, self.share(group))
            if like(weights, z) is weights:  # without a copy: on the CPU fresh memory costs more than the sum
                torch._foreach_copy_(weights, z)
                torch._foreach_lerp_(weights, x, group["interpolation"])
            else:
                torch._foreach_copy_(weights, torch._foreach_lerp(z, x, group["interpolation"]))

    def averages(self) -> dict[Tensor, Tensor]:
        """Of each parameter that has stepped, x."""
        return {p: kept["x"] for p, kept in self.state.items()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the parameters hold x."""
        averages = self.averages()
        params = list(averages)
        held = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, x in averages.items():
                p.copy_(x)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, y in zip(params, held):
                    p.copy_(y)


class ScheduleFree(Averaging):
    """Each iterate counts by its squared learning rate: x is as good as a decayed run at any time.

    Defazio et al. 2024, arXiv:2405.15682. The learning rate warms up and stays; the interpolation takes the
    place of momentum, so that of the optimizer should be 0. Memory: two copies of the parameters.
    """

    def share(self, group: dict[str, Any]) -> float:
        """lr² / the sum of lr² so far, which is kept in the group."""
        weight = float(group["lr"]) ** 2
        group["averaged"] = total = group.get("averaged", 0.0) + weight
        return weight / total if total else 0.0


class PrimalAveraging(Averaging):
    """Generalised primal averaging (GPA): x is an exponential average, under any learning rate schedule.

    Defazio et al. 2025, arXiv:2512.17131; their mu_y is the interpolation, and 1 - mu_x the group's
    `averaging_rate`. Memory: two copies of the parameters.
    """

    def __init__(
        self, optimizer: Optimizer, interpolation: float = 0.9, averaging_rate: float = 0.01
    ) -> None:
        if not 0 < averaging_rate <= 1:
            raise ValueError(f"averaging_rate is {averaging_rate}; it must lie above 0 and up to 1")
        super().__init__(optimizer, interpolation, averaging_rate=averaging_rate)

    def share(self, group: dict[str, Any]) -> float:
        """The group's averaging rate."""
        return group["averaging_rate"]


class EMANesterov(Wrapper):
    """Gradients ahead of the iterate, along an exponential average of its movement.

    y = x + extrapolation lr / max lr so far · trend; x' = the optimizer's step from y; trend += trend_rate
    (x' - x - trend). The parameters hold y. Yau et al. 2026, arXiv:2605.25395. With constant coefficients it
    visits the same y as `PrimalAveraging` of interpolation e, averaging_rate r (1 - e) and 1 / (1 - e) times
    the learning rate (e the extrapolation, r the trend_rate). Memory: one copy of the parameters.
    """

    kept = ("trend",)

    def __init__(self, optimizer: Optimizer, extrapolation: float = 0.3, trend_rate: float = 0.01) -> None:
        if not 0 <= extrapolation < 1:
            raise ValueError(f"extrapolation is {extrapolation}; it must lie in [0, 1)")
        if not 0 < trend_rate <= 1:
            raise ValueError(f"trend_rate is {trend_rate}; it must lie above 0 and up to 1")
        super().__init__(optimizer, extrapolation=extrapolation, trend_rate=trend_rate)

    @contextmanager
    def around(self, stepping: Stepping) -> Iterator[None]:
        """Take the movement from x into the trend, then move the parameters ahead along it."""
        for group, params in stepping:
            trend, rate = self.keep(params, "trend", zero=True), group["trend_rate"]
            # x' - x = (x' - y) + ahead * trend, so x itself need not be kept
            torch._foreach_mul_(trend, 1 - rate + rate * group.get("ahead", 0.0))
            torch._foreach_sub_(trend, shards(params), alpha=rate)
        yield
        for group, params in stepping:
            trend = self.keep(params, "trend")
            torch._foreach_add_(trend, shards(params), alpha=group["trend_rate"])
            lr = float(group["lr"])
            group["peak_lr"] = max(lr, group.get("peak_lr", 0.0))
            group["ahead"] = group["extrapolation"] * lr / group["peak_lr"] if lr else 0.0
            if group["ahead"]:
                torch._foreach_add_(shards(params), trend, alpha=group["ahead"])


class Lookahead(Wrapper):
    """Every so many steps, the weights go back to a slow copy that went part of the way with them.

    slow += lookahead (weights - slow); weights = slow. Zhang et al. 2019, arXiv:1907.08610. `lookahead`, the
    part of the way, is in each group; momentum is left as it is. Memory: one copy of the parameters.
    """

    kept = ("slow",)

    def __init__(self, optimizer: Optimizer, every: int = 5, lookahead: float = 0.5) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be 1 or more")
        if not 0 < lookahead <= 1:
            raise ValueError(f"lookahead is {lookahead}; it must lie above 0 and up to 1")
        super().__init__(optimizer, lookahead=lookahead)
        self.every = every

    @contextmanager
    def around(self, stepping: Stepping) -> Iterator[None]:
        """Note where each weight starts from; go back when it is time."""
        for _, params in stepping:
            self.keep(params, "slow")
        yield
        for group in self.param_groups:
            group["lookahead_steps"] = steps = group.get("lookahead_steps", 0) + 1
            params = [p for p in group["params"] if p in self.state]
            if params and steps % self.every == 0:
                slow, weights = self.keep(params, "slow"), shards(params)
                torch._foreach_lerp_(slow, like(weights, slow), group["lookahead"])
                torch._foreach_copy_(weights, slow)
