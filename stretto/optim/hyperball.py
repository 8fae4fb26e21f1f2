"""Hyperball: matrices and their steps of constant Frobenius norm. Wen et al. 2026, arXiv:2606.16899."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor
from torch.optim import Optimizer

from stretto.optim.exchange import is_dtensor, over_shards
from stretto.optim.wrapper import Stepping, Wrapper, shards

TINY = 1e-30  # a divisor in place of 0


def norms(tensors: list[Tensor] | tuple[Tensor, ...], params: list[Tensor] | None = None) -> Tensor:
    """The Frobenius norm of each of K tensors on one device: (K,), in float32 or better.

    params: what the tensors are shards of, where they may be; then the norms are those of the wholes.
    """
    exact = reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
    found = torch.stack(torch._foreach_norm(tensors, 2, exact))
    if params is None or not any(map(is_dtensor, params)):
        return found
    return over_shards(found.square(), params).sqrt()


def turn(params: list[Tensor], before: list[Tensor], radii: Tensor, lr: float) -> None:
    """Keep the direction of each step from before to params, and no norm: R normalize(W - lr R normalize(u)).

    before holds this rank's shards. radii (K,) holds R; where it is 0, the step is left as it is, and a step of 0
    stays one. In place on both.
    """
    weights = shards(params)
    steps = torch._foreach_sub(before, weights)
    on_ball = radii > 0
    lengths = torch.where(on_ball, lr * radii / norms(steps, params).clamp(min=TINY), 1.0)
    torch._foreach_mul_(steps, list(lengths.unbind()))
    torch._foreach_sub_(before, steps)
    scales = torch.where(on_ball, radii / norms(before, params).clamp(min=TINY), 1.0)
    torch._foreach_mul_(before, list(scales.unbind()))
    torch._foreach_copy_(weights, before)


class Hyperball(Wrapper):
    """Weights of two or more dimensions keep the norm they began with and turn by about lr radians a step.

    Of the optimizer inside only the direction of its step counts, so lr is relative: about 0.01 to 0.02 for
    matrices, whatever their shape. Its weight decay has no effect but to bend that direction; let it be 0.
    Groups with `hyperball=False` (embeddings, heads), weights of fewer dimensions and those that begin at zero
    step as they did. Memory: one number a matrix, and two copies of the matrices within the step. Raises
    ValueError where no weight has two dimensions.
    """

    kept = ("radius",)

    def __init__(self, optimizer: Optimizer) -> None:
        if not any(p.ndim > 1 for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"Hyperball looks for weights of two or more dimensions and found none in "
                f"{type(optimizer).__name__}; give it the model's matrices, or leave Hyperball out"
            )
        super().__init__(optimizer, hyperball=True)

    @contextmanager
    def around(self, stepping: Stepping) -> Iterator[None]:
        """Note where each matrix is, then turn it towards where it went."""
        turning = []
        for group, params in stepping:
            matrices = [p for p in params if p.ndim > 1]
            if matrices and group["hyperball"]:
                turning.append(
                    (group, matrices, list(torch._foreach_clone(shards(matrices))), self._radii(matrices))
                )
        yield
        for group, matrices, before, radii in turning:
            turn(matrices, before, radii, float(group["lr"]))

    def _radii(self, matrices: list[Tensor]) -> Tensor:
        new = [p for p in matrices if "radius" not in self.state[p]]
        if new:
            for p, radius in zip(new, norms(shards(new), new).unbind()):
                self.state[p]["radius"] = radius.clone()
        return torch.stack([self.state[p]["radius"] for p in matrices])
