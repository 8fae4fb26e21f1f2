"""Hyperball: matrices and their steps of constant Frobenius norm. Wen et al. 2026, arXiv:2606.16899."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from stretto import optim
from stretto.core import FactorsMethod, Phase, WrapMethod
from stretto.methods._kinds import without_tables


@dataclass(frozen=True)
class Hyperball(WrapMethod, FactorsMethod):
    """Hidden matrices keep the norm that they began with, and turn by about lr radians a step.

    Only the direction of the optimizer's step counts for them, so the rate is relative, 0.01 to 0.02 for any
    shape, and weight decay has nothing left to do: give the optimizer weight_decay=0. Embeddings, heads, vectors and
    what begins at zero step as they did, at rates that TypeRates sets apart. Sits inside Lookahead, EMA-Nesterov and
    Schedule-Free, in the place of cautious weight decay.
    Cost: eight passes over the matrices, and two copies of them within the step; a number a matrix is kept.
    Evidence: Muon in 20 to 30 % fewer tokens than with weight decay, on Qwen3-like models up to 1.2B parameters, and
    rates that carry over to other widths and depths (Wen et al.). SOAP took GPT-2 to its loss in 3125
    steps with it, without in more than 3400, at an untuned schedule (modded-nanogpt, pull request 302).
    Raises ValueError where the model has no hidden matrix.
    """

    phases = (Phase.LENGTH, Phase.DECAY, Phase.GROUP)

    def factors(self, model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, float]:
        """Not for embeddings and heads."""
        return without_tables(self, "hyperball", model, name)

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """`optim.Hyperball` around it."""
        return optim.Hyperball(optimizer)
