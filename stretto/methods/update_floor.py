"""Update floor: no matrix steps by less than a share of its size. Krishna 2026, modded-nanogpt, pull request 274."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from stretto import optim
from stretto.core import FactorsMethod, Phase, WrapMethod
from stretto.methods._kinds import without_tables


@dataclass(frozen=True)
class UpdateFloor(WrapMethod, FactorsMethod):
    """Lengthens steps of hidden matrices to at least lr * floor times the norm of the matrix.

    Keeps steps in proportion to weights that have grown, which weight decay does otherwise. Embeddings, heads
    and vectors step as they did. Sits inside cautious weight decay, which stays apart, and excludes Hyperball.
    Cost: seven passes over the matrices, and two copies of them within the step.
    Evidence: with NorMuon, from 3500 steps to 3250 on the GPT-2 yardstick (modded-nanogpt, pull request 274), and
    part of its record of 2690 steps, there for each row (328).
    Raises ValueError for a floor that is not above 0, and where the model has no hidden matrix.
    """

    floor: float = (
        0.35  # least norm of a step at lr 1, as a share of the matrix's; found at a peak lr of 0.0375
    )
    phases = (Phase.LENGTH, Phase.GROUP)

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise ValueError(f"UpdateFloor: floor is {self.floor}; it must be above 0")

    def factors(self, model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, float]:
        """Not for embeddings and heads."""
        return without_tables(self, "update_floor", model, name)

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """`optim.UpdateFloor` around it."""
        return optim.UpdateFloor(optimizer, self.floor)
