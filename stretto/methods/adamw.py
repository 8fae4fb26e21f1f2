"""AdamW: Adam with decoupled weight decay. Loshchilov and Hutter 2019, arXiv:1711.05101."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from stretto.core import FactorsMethod, Group, OptimizerMethod, Phase
from stretto.methods._checks import check_rates, decays


@dataclass(frozen=True)
class AdamW(OptimizerMethod, FactorsMethod):
    """torch's AdamW, fused; vectors, norms and biases do not decay.

    Cost: one fused pass over weights, gradients and state; two values a parameter are kept.
    Evidence: the usual optimizer of transformers, and a fair reference only when tuned: on stdlib-gpt a rate of
    1e-3 beat 2e-3 at every batch size and decay tried, by 0.02 to 0.27 nats a byte (docs/LOG.md).
    Raises ValueError for rates out of range.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    phases = (Phase.UPDATE, Phase.GROUP)
    spaces = {"lr": "log:2e-4..2e-2", "weight_decay": "log:0.01..1"}

    def __post_init__(self) -> None:
        check_rates(self, "lr", "eps", "weight_decay", betas=self.betas)

    def factors(self, model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, float]:
        """No decay on vectors."""
        return {} if decays(parameter) else {"weight_decay": 0.0}

    def optimizer(self, model: nn.Module, groups: list[Group]) -> Optimizer:
        """torch.optim.AdamW over the groups."""
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )
