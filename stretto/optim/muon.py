"""Muon: momentum, orthogonalised, for matrices; AdamW for all the rest. Jordan et al. 2024."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from stretto.optim.roots import orthogonalize

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class Muon(Optimizer):
    """Groups with `spectral=True` step by Muon, the others by AdamW.

    Spectral parameters have two or more dimensions, seen as (out, rest). Their step is lr times an orthogonal
    factor of the Nesterov momentum, scaled by 0.2 sqrt(max(out, rest)), so that its root mean square is about
    AdamW's and learning rates carry over (Liu et al. 2025, arXiv:2502.16982). Weight decay is decoupled.
    Equal shapes are orthogonalised as one stack.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        iterations: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        spectral: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "iterations": iterations, "betas": betas, "eps": eps,
            "weight_decay": weight_decay, "spectral": spectral,
        }  # fmt: skip
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if group["spectral"] and p.ndim < 2:
                    raise ValueError(
                        f"Muon orthogonalises matrices, and a parameter has shape {tuple(p.shape)}; "
                        "put it into a group with spectral=False"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["spectral"]:
                self._spectral(group, params)
            elif params:
                self._adamw(group, params)
        return loss

    def _spectral(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        momenta = [self._state(p, "momentum") for p in params]
        beta, lr = group["momentum"], group["lr"]
        torch._foreach_lerp_(momenta, grads, 1 - beta)
        updates = torch._foreach_lerp(grads, momenta, beta)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            shapes[(len(p), p[0].numel())].append(i)
        for shape, members in shapes.items():
            stack = torch.stack([updates[i].reshape(shape) for i in members])
            scale = 0.2 * max(shape) ** 0.5
            factors = orthogonalize(stack, group["iterations"]).unbind()
            mine = [params[i] for i in members]
            torch._foreach_add_(mine, [f.reshape(p.shape) for f, p in zip(factors, mine)], alpha=-lr * scale)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [self._state(p, "exp_avg") for p in params],
            [self._state(p, "exp_avg_sq") for p in params],
            [],
            [self.state[p]["step"] for p in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, p: Tensor, name: str) -> Tensor:
        if name not in self.state[p]:
            self.state[p][name] = torch.zeros_like(p)
        return self.state[p][name]
