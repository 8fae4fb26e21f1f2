"""Muon: orthogonalised momentum for hidden matrices. Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982.

Amsel et al. 2025 (Polar Express coefficients), arXiv:2505.16932; Li et al. 2025 (NorMuon), arXiv:2510.05491.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from stretto import optim
from stretto.core import Group
from stretto.methods._checks import check_choices, check_counts, check_rates
from stretto.methods._kinds import MatrixOptimizer, by_kind, kinds_with_matrices


@dataclass(frozen=True)
class Muon(MatrixOptimizer):
    """Hidden matrices step by Muon; embeddings, head and vectors by AdamW.

    With neuron_beta2 it is NorMuon: the rows of each step are brought to one size over time.
    Cost: `iterations` small matrix products a step, 2 * iterations * k² (2 l + k) FLOPs for a k x l matrix: much
    beside a small batch, little beside a large one. State: one value a matrix entry, two elsewhere.
    Evidence: it took the modded-nanogpt record from 31 to 22 minutes (8 H100), and needs about half of AdamW's
    compute at scale (Liu et al.). On stdlib-gpt, 14 steps: 2.40 nats a byte, with AdamW instead 2.85
    (docs/LOG.md). NorMuon with 0.95 took GPT-2 to its loss in 3250 steps instead of 3325 (modded-nanogpt, results
    10 and 12).
    Raises ValueError for rates out of range, and where the model has no hidden matrix.
    """

    lr: float = 0.02  # of matrices, in AdamW's scale: the step's root mean square is about 0.2 lr
    adam_lr: float = 4e-3  # of embeddings, head and vectors
    momentum: float = 0.95
    iterations: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    coefficients: Literal["jordan", "polar"] = "jordan"  # of the iterations: one polynomial, or Polar Express
    neuron_beta2: float = 0.0  # of the average square of a row; 0 leaves rows as they are
    spaces = {"lr": "log:0.005..0.08", "adam_lr": "log:1e-3..2e-2", "weight_decay": "log:0.01..1"}

    def __post_init__(self) -> None:
        check_rates(
            self,
            "lr",
            "adam_lr",
            "eps",
            "weight_decay",
            betas=(self.momentum, self.neuron_beta2, *self.betas),
        )
        check_choices(self, "coefficients")
        check_counts(self, "iterations")

    def optimizer(self, model: nn.Module, groups: list[Group]) -> Optimizer:
        """One optimizer whose groups step by one rule or the other."""
        kinds = kinds_with_matrices(self, model, "use AdamW")
        spectral = {"direction": "spectral", "betas": (self.momentum, self.betas[1]), "lr": self.lr}
        diagonal = {"direction": "diagonal", "lr": self.adam_lr}
        return optim.Shampoo(
            by_kind(groups, kinds, {"matrix": spectral}, diagonal),
            self.lr,
            self.betas,
            self.eps,
            self.weight_decay,
            iterations=self.iterations,
            coefficients=self.coefficients,
            neuron_beta2=self.neuron_beta2,
        )
