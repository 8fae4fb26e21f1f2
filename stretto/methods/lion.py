"""Lion: steps by the sign of a momentum. Chen et al. 2023, arXiv:2302.06675."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from stretto import optim
from stretto.core import FactorsMethod, Group, OptimizerMethod, Phase
from stretto.methods._checks import check_rates, decays


@dataclass(frozen=True)
class Lion(OptimizerMethod, FactorsMethod):
    """Moves each weight by the learning rate, against the sign of a momentum.

    Its learning rate is 3 to 10 times smaller than AdamW's, its decay as many times larger. Vectors, norms and
    biases do not decay.
    Cost: five passes over the weights; one value a parameter is kept, half of AdamW's.
    Evidence: weak. Better than AdamW on images, diffusion and language by those who found it (Chen et al.), but
    contradicted at equal budget; here to be measured.
    Raises ValueError for rates out of range.
    """

    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)  # of the gradient in the step, and in the average
    weight_decay: float = 1.0
    phases = (Phase.UPDATE, Phase.GROUP)
    spaces = {"lr": "log:2e-5..2e-3", "weight_decay": "log:0.1..10"}

    def __post_init__(self) -> None:
        check_rates(self, "lr", "weight_decay", betas=self.betas)

    def factors(self, model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, float]:
        """No decay on vectors."""
        return {} if decays(parameter) else {"weight_decay": 0.0}

    def optimizer(self, model: nn.Module, groups: list[Group]) -> Optimizer:
        """`optim.Lion` over the groups."""
        return optim.Lion(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
