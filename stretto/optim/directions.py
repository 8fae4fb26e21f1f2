"""From a stack of gradients to a stack of steps: every direction, on plain tensors.

A bucket's tensors are stacks of equal blocks (B, d1 .. dr). `accumulate` takes a gradient into the factors, `advance`
turns it into a step; both change what is kept in place, know no time and no parameter, and compile as one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from stretto.optim.graft import divided, lengths, track
from stretto.optim.roots import orthogonalize
from stretto.optim.symmetric import Rate, Symmetric, over

Kept = dict[str, Tensor]  # what a bucket keeps, by name: momentum, square, factor0, root0, ...


@dataclass(frozen=True)
class Rule:
    """What of a group's options decides which operations a step has; the rest is in Rates."""

    direction: str
    sides: tuple[int, ...]
    axes: tuple[int, ...]  # the parameter's dims, in the order of the stack's
    graft: str | None
    summed: bool  # the grafting squares are summed, not averaged
    then: str | None
    iterations: int
    coefficients: str
    scale: str | None
    nesterov: bool
    products: torch.dtype | None  # of the matrix products; None for that of the stacks
    lengths: tuple[int, ...]  # of what is here of the parameters, one after the other, for the diagonal rule
    sizes: tuple[int, ...]  # of the whole parameters
    total: Callable[[Tensor], Tensor] | None = (
        None  # of sums, one a parameter, over the ranks that have a part
    )


class Rates(NamedTuple):
    """Numbers of one step: floats; or (B, 1 .. 1) where blocks differ, (1, 1 .. 1) where they must not be constants.

    Weights are those of what is new, and 0 where a step is skipped.
    """

    lr: Rate
    keep: Rate  # 1, or 0 where the step is skipped
    momentum: Rate  # weight of the gradient in the momentum
    lead: float  # beta3 / beta1
    correction: Rate  # 1 - beta3 beta1^(t - 1), what the momentum's sum of weights is
    second: Rate  # weight of the square in the second moment of the eigenbasis
    second_correction: Rate
    square: Rate  # weight of the square in the grafting moment
    square_correction: Rate
    eps: float
    neurons: Rate  # weight of a row's square in its average
    velocity: Rate  # of the momentum after preconditioning, what is kept of it
    clip: float | None


def accumulate(gradient: Tensor, kept: Kept, rule: Rule, decay: Rate, weight: Rate) -> None:
    """factor_k <- decay factor_k + weight G_(k) G_(k)ᵀ for each side; for KL of the gradient whitened by the others."""
    for position, side in enumerate(rule.sides):
        x = gradient if rule.products is None else gradient.to(rule.products)
        share: Rate = weight
        if rule.direction == "kl":
            others = [(p, s) for p, s in enumerate(rule.sides) if p != position]
            for p, s in others:
                x = along(x, s, symmetric(kept, "root", p), Scratch(torch.empty_like(x)))
            share = weight / prod(gradient.shape[1 + s] for _, s in others)
        factor = symmetric(kept, "factor", position)
        if factor.rest is None and is_small_middle(x, side):
            rows = x.view(-1, *x.shape[-2:])
            grams = torch.bmm(rows, rows.mT).view(*x.shape[:-1], -1).sum(dim=1).to(gradient.dtype)
            factor.top.copy_(factor.top * over(decay, grams) + grams * over(share, grams))
        elif factor.top.dtype == gradient.dtype:
            factor.add_gram(*unfolded(x, side), decay, share)
        else:
            exact = Symmetric(*(part.to(gradient.dtype) for part in factor.parts()))
            exact.add_gram(*unfolded(x, side), decay, share)
            torch._foreach_copy_(factor.parts(), exact.parts())


def symmetric(kept: Kept, name: str, position: int) -> Symmetric:
    """The factors or the roots of one side."""
    return Symmetric(kept[f"{name}{position}"], kept.get(f"{name}{position}_rest"))


def advance(gradient: Tensor, kept: Kept, rule: Rule, rates: Rates, ready: Tensor | None) -> Tensor:
    """The step -lr P of each block, from its gradient, which is overwritten: (B, d1 .. dr) -> the same.

    ready (B,) tells which blocks have been refreshed, None that all have: the others step by the grafting rule.
    """
    scratch = Scratch(gradient)
    g = gradient
    if "square" in kept:
        track(kept["square"], g, rates.square, scratch.beside(g), summed=rule.summed)
    if rule.direction == "soap":
        g = turned(g, kept, rule, scratch, back=False)
        track(kept["second"], g, rates.second, scratch.beside(g), summed=False)
    x = g
    if "momentum" in kept:
        momentum = kept["momentum"].lerp_(g, rates.momentum)
        x = momentum if rates.lead == 1 else g.lerp_(momentum, rates.lead)
    if rule.direction == "diagonal":
        return _finish(*_grafted(x, kept, rule, rates, scratch), None, kept, rule, rates)
    if rule.graft is None:
        return _finish(*_directed(x, kept, rule, rates, scratch), None, kept, rule, rates)
    own, size = _grafted(x, kept, rule, rates, scratch)
    ratio = lengths(own)
    unready = own.clone() if ready is not None else None
    step, _ = _directed(x, kept, rule, rates, scratch)
    ratio.div_(lengths(step).clamp_min_(1e-30))
    if ready is not None and unready is not None:
        step, ratio = torch.where(over(ready, step), step * ratio, unready), torch.ones_like(ratio)
    return _finish(step, size, ratio, kept, rule, rates)


class Scratch:
    """Two stacks, all the memory that a step may take beyond what is kept; the second is made when it is needed."""

    def __init__(self, first: Tensor) -> None:
        self.first = first
        self.second: Tensor | None = None

    def beside(self, x: Tensor) -> Tensor:
        """The one that does not hold x."""
        if x is self.second:
            return self.first
        if self.second is None:
            self.second = torch.empty_like(self.first)
        return self.second

    def holds(self, x: Tensor) -> bool:
        """Whether x may be overwritten."""
        return x is self.first or x is self.second


def _grafted(x: Tensor, kept: Kept, rule: Rule, rates: Rates, scratch: Scratch) -> tuple[Tensor, Rate]:
    """The grafting rule's step and what it is still to be multiplied by."""
    out = scratch.beside(x)
    if rule.graft == "sgd":
        return out.copy_(x), 1 / rates.correction
    root = rates.square_correction**0.5
    return divided(x, kept["square"], rates.eps * root, out), root / rates.correction


def _directed(x: Tensor, kept: Kept, rule: Rule, rates: Rates, scratch: Scratch) -> tuple[Tensor, Rate]:
    """The preconditioned step, in scratch, and what it is still to be multiplied by."""
    size: Rate = 1 / rates.correction
    if rule.direction == "spectral":
        return orthogonal(x, kept, rule, rates, scratch), 1.0
    if rule.direction == "soap":
        root = rates.second_correction**0.5
        x = divided(x, kept["second"], rates.eps * root, scratch.beside(x))
        x, size = turned(x, kept, rule, scratch, back=True), root * size
    elif rule.direction == "eigen":
        x = turned(x, kept, rule, scratch, back=False)
        for position, side in enumerate(rule.sides):
            x.mul_(
                kept[f"powers{position}"].view(len(x), *[-1 if d == side else 1 for d in range(x.ndim - 1)])
            )
        x = turned(x, kept, rule, scratch, back=True)
    else:
        exact = x.dtype
        x, scratch = _cast(x, rule, scratch)
        for position, side in enumerate(rule.sides):
            x = along(x, side, symmetric(kept, "root", position), scratch)
        x = x.to(exact)
    return (orthogonal(x, kept, rule, rates, scratch), 1.0) if rule.then else (x, size)


def turned(x: Tensor, kept: Kept, rule: Rule, scratch: Scratch, *, back: bool) -> Tensor:
    """x in the eigenbases of its sides, or back from them, in scratch."""
    exact = x.dtype
    x, scratch = _cast(x, rule, scratch)
    for position, side in enumerate(rule.sides):
        basis = kept[f"basis{position}"]
        x = along(x, side, basis if back else basis.mT, scratch)
    return x.to(exact)


def along(x: Tensor, side: int, matrices: Tensor | Symmetric, scratch: Scratch) -> Tensor:
    """x (B, d1 .. dr) times matrices (B, d, d) along one side, in scratch."""
    out = scratch.beside(x)
    is_last = side == x.ndim - 2
    halves = [part.to(x.dtype) for part in matrices.parts()] if isinstance(matrices, Symmetric) else []
    matrix = halves[0] if isinstance(matrices, Symmetric) else matrices.to(x.dtype)
    if len(halves) < 2 and is_small_middle(x, side):
        repeated = matrix.repeat_interleave(x.shape[1], dim=0)
        torch.bmm(repeated, x.view(-1, *x.shape[-2:]), out=out.view(-1, *x.shape[-2:]))
    elif side > 0 and not is_last:  # the side comes first in a copy, and the product goes where x was
        moved, under = out.view(len(x), x.shape[1 + side], -1), x if scratch.holds(x) else torch.empty_like(x)
        shape = x.movedim(side + 1, 1).shape
        moved.view(shape).copy_(x.movedim(side + 1, 1))
        product = under.view(moved.shape)
        Symmetric(*halves).multiply(moved, product) if halves else torch.bmm(matrix, moved, out=product)
        out.movedim(side + 1, 1).copy_(product.view(shape))
    elif len(halves) == 2:
        Symmetric(*halves).multiply(unfold(x, side), unfold(out, side))
    elif x.ndim == 2 or side == 0:
        torch.bmm(matrix, unfold(x, side), out=unfold(out, side))
    else:
        transposed = matrix if halves else matrix.mT
        torch.bmm(x.flatten(1, -2), transposed, out=out.flatten(1, -2))
    return out


def is_small_middle(x: Tensor, side: int) -> bool:
    """Whether a side is the middle of three and so small that its products need no copy of x to be fast."""
    return x.ndim == 4 and side == 1 and x.shape[2] <= 32


def unfold(x: Tensor, side: int) -> Tensor:
    """(B, d1 .. dr) -> (B, d, rest) along one side; a view for the first and the last."""
    if x.ndim == 2:
        return x[:, :, None]
    if side == 0:
        return x.flatten(2)
    if side == x.ndim - 2:
        return x.flatten(1, -2).mT
    return x.movedim(side + 1, 1).flatten(2)


def unfolded(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The unfolding along one side and its transpose."""
    if side == x.ndim - 2 and side > 0:
        rows = x.flatten(1, -2)
        return rows.mT, rows
    columns = unfold(x, side)
    return columns, columns.mT


def orthogonal(x: Tensor, kept: Kept, rule: Rule, rates: Rates, scratch: Scratch) -> Tensor:
    """The orthogonal factor of each block seen as a matrix (d1, rest), sized for its shape; x is overwritten."""
    exact = x.dtype
    x, scratch = _cast(x, rule, scratch)
    if not scratch.holds(x):
        x = scratch.beside(x).copy_(x)
    spare = scratch.beside(x)
    factors = orthogonalize(
        x.flatten(2), rule.iterations, rule.coefficients, spare.view(len(x), x.shape[1], -1)
    )
    m, n = factors.shape[1:]
    size = {"match_rms": 0.2 * max(m, n) ** 0.5, "original": max(1.0, m / n) ** 0.5, None: 1.0}[rule.scale]
    factors = factors.to(exact)
    if "neurons" in kept:
        factors = balance_rows(factors, kept["neurons"], rates.neurons)
        size *= min(m, n) ** 0.5 / (m * n) ** 0.5  # the root mean square of an orthogonal factor
    return factors.mul_(size).view(x.shape)


def balance_rows(stack: Tensor, squares: Tensor, weight: Rate) -> Tensor:
    """Divide each row by its root mean square over time, then each matrix by its own: (B, m, n) -> the same.

    squares (B, m) is the average of each row's mean square, zero at first, and is updated in place. NorMuon, Li et
    al. 2025, arXiv:2510.05491.
    """
    squares.lerp_(stack.square().mean(dim=-1), over(weight, squares))
    scaled = stack / (squares.sqrt() + 1e-8)[..., None]
    return scaled / (lengths(scaled) / scaled[0].numel() ** 0.5).clamp_min(1e-20)


def _finish(step: Tensor, size: Rate, ratio: Tensor | None, kept: Kept, rule: Rule, rates: Rates) -> Tensor:
    """Multiply by size and, for each block, by ratio; clip, take into the momentum after preconditioning; by -lr."""
    if rates.clip is not None and rule.direction == "diagonal":
        pieces = step.mul_(size).split(rule.lengths)
        means = torch.stack([piece.square().sum() / size for piece, size in zip(pieces, rule.sizes)])
        means = (means if rule.total is None else rule.total(means)).sqrt()
        torch._foreach_mul_(pieces, list((rates.clip / means.clamp_min(1e-30)).clamp_max(1.0).unbind()))
        size = 1.0
    elif rates.clip is not None:
        means = lengths(step) * size * prod(step.shape[1:]) ** -0.5
        means = means if ratio is None else means * ratio
        clipped = (rates.clip / means.clamp_min(1e-30)).clamp_max(1.0)
        ratio = clipped if ratio is None else ratio * clipped
    size = size * (-rates.lr if "velocity" not in kept else rates.keep)
    step.mul_(size if ratio is None else ratio * size)
    if "velocity" not in kept:
        return step
    velocity = kept["velocity"].mul_(rates.velocity).add_(step)
    step = step.add_(velocity * rates.velocity) if rule.nesterov else velocity.clone()
    return step.mul_(-rates.lr)


def _cast(x: Tensor, rule: Rule, scratch: Scratch) -> tuple[Tensor, Scratch]:
    """x and scratch for products in the rule's dtype."""
    if rule.products is None or rule.products == x.dtype:
        return x, scratch
    x = x.to(rule.products)
    return x, Scratch(x)
