"""Shampoo: gradients multiplied, side by side, by inverse roots of their second moments.

Gupta et al. 2018, arXiv:1802.09568; Anil et al. 2021, arXiv:2002.09018; Shi et al. 2023, arXiv:2309.06497.
Lin et al. 2025 (KL-Shampoo), arXiv:2509.03378.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from stretto import optim
from stretto.core import Group
from stretto.methods._checks import check_choices, check_counts, check_rates
from stretto.methods._kinds import MatrixOptimizer, with_tables


@dataclass(frozen=True)
class Shampoo(MatrixOptimizer):
    """Matrices and kernels step by Shampoo, with the length of Adam's step unless told otherwise.

    A rate that was tuned for AdamW is a good first one. Embeddings and heads have the shorter side alone; vectors
    step by the grafting rule, and do not decay. The fused queries, keys and values of an attention layer are
    cut by its heads. Each block is refreshed once in `every` steps, a share of all blocks at each.
    Cost: 4 k l (k + l) FLOPs a step for a k x l block, and (k³ + l³) / every times what a root takes. State: two values
    an entry, and k² + l² for each block twice; 10 bytes a parameter of a ResNet-18, 34 of a transformer 128
    wide, and 21 of that with storage="bfloat16".
    Evidence: Nesterov's 90-epoch accuracy on ImageNet in 60 epochs (ResNet-50, at most 10 % more time a step, Shi et
    al.), and 28 % less time than NadamW on AlgoPerf 2024 (external tuning). GPT-2 to its loss in 4100 steps, 3375
    with one side and the pseudo-inverse, 3150 with power 1/3 and the pseudo-inverse (pull request 327), where
    Muon takes 3250 (modded-nanogpt).
    Raises ValueError for values out of range.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)  # of the momentum, and of all second moments; 1 sums those
    eps: float = 1e-8  # of the grafting rule
    weight_decay: float = 0.1
    direction: Literal["root", "eigen", "kl", "one_sided"] = "root"  # eigen: cheaper refresh, costlier steps
    graft: Literal["auto", "adam", "rmsprop", "adagrad", "sgd", None] = (
        "auto"  # whose length a step has; auto: adam, or None for kl
    )
    every: int = 10  # steps from one refresh of a block to the next
    block: int = 1024  # the largest side of a block
    ridge: Literal["relative", "absolute", "pinv"] = (
        "relative"  # to the largest eigenvalue; pinv: the pseudo-inverse
    )
    ridge_eps: float = 1e-6  # added to eigenvalues; unused by pinv
    power: float | None = None  # p of the inverse roots of matrices; None: 1/(2 sides), 1/2 for kl
    start: int = 1  # step of the first refresh; those before are the grafting rule's
    tables: Literal["one_sided", "diagonal"] = "one_sided"  # how embeddings and heads step; diagonal: Adam
    products: Literal["bfloat16", None] = None  # dtype of matrix products; None: float32
    storage: Literal["bfloat16", None] = None  # dtype of factors and roots; None: float32
    spaces = {"lr": "log:2e-4..2e-2", "weight_decay": "log:0.01..1"}

    def __post_init__(self) -> None:
        check_rates(self, "lr", "eps", "weight_decay", "ridge_eps", betas=self.betas[:1])
        check_choices(self, "direction", "graft", "ridge", "tables", "products", "storage")
        check_counts(self, "every", "block", "start")
        if not 0 <= self.betas[1] <= 1:
            raise ValueError(f"Shampoo: the second beta is {self.betas[1]}; it must lie in [0, 1]")
        if self.power is not None and not self.power > 0:
            raise ValueError(f"Shampoo: power is {self.power}; it must be above 0, or None")

    def optimizer(self, model: nn.Module, groups: list[Group]) -> Optimizer:
        """`optim.Shampoo` over the groups, cut by kind."""
        return optim.Shampoo(
            with_tables(model, groups, {"direction": self.tables, "power": None}),
            self.lr,
            self.betas,
            self.eps,
            self.weight_decay,
            direction=self.direction,
            graft=self.graft,
            every=self.every,
            block=self.block,
            ridge=self.ridge,
            ridge_eps=self.ridge_eps,
            power=self.power,
            start=self.start,
            products=self.products,
            storage=self.storage,
        )
