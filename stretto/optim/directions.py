"""From a stack of gradients to a stack of steps: every direction, on plain tensors.

A bucket's tensors are stacks of equal blocks (B, d1 .. dr). `accumulate` takes a gradient into the factors, `advance`
turns it into a step; both change what is kept in place, know no time and no parameter, and compile as one graph.
"""

from __future__ import annotations

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
    graft: str | None
    summed: bool  # the grafting squares are summed, not averaged
    then: str | None
    iterations: int
    coefficients: str
    scale: str | None
    nesterov: bool
    products: torch.dtype | None  # of the matrix products; None for that of the stacks
    lengths: tuple[int, ...]  # of the parameters that lie one after the other, for the diagonal rule


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
                x = along(x, s, symmetric(kept, "root", p), torch.empty_like(x))
            share = weight / prod(gradient.shape[1 + s] for _, s in others)
        factor = symmetric(kept, "factor", position)
        if factor.top.dtype == gradient.dtype:
            factor.add_gram(unfold(x, side), decay, share)
        else:
            exact = Symmetric(*(part.to(gradient.dtype) for part in factor.parts()))
            exact.add_gram(unfold(x, side), decay, share)
            torch._foreach_copy_(factor.parts(), exact.parts())


def symmetric(kept: Kept, name: str, position: int) -> Symmetric:
    """The factors or the roots of one side."""
    return Symmetric(kept[f"{name}{position}"], kept.get(f"{name}{position}_rest"))


def advance(gradient: Tensor, kept: Kept, rule: Rule, rates: Rates, ready: Tensor | None) -> Tensor:
    """The step -lr P of each block, from its gradient, which is overwritten: (B, d1 .. dr) -> the same.

    ready (B,) tells which blocks have been refreshed, None that all have: the others step by the grafting rule.
    """
    scratch = Scratch(gradient, torch.empty_like(gradient))
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
        return _finish(*_grafted(x, kept, rule, rates, scratch), kept, rule, rates)
    length, unready, graft_size = None, None, 1.0
    if rule.graft is not None:
        own, size = _grafted(x, kept, rule, rates, scratch)
        length = lengths(own)
        unready = own * size if ready is not None else None
        graft_size = size
    step, size = _directed(x, kept, rule, rates, scratch)
    if length is not None:
        size = length.div_(lengths(step).clamp_min_(1e-30)) * graft_size
    if ready is not None and unready is not None:
        step, size = torch.where(_wide(ready, step), step * size, unready), 1.0
    return _finish(step, size, kept, rule, rates)


@dataclass(frozen=True)
class Scratch:
    """Two stacks, all the memory that a step may take beyond what is kept."""

    first: Tensor
    second: Tensor

    def beside(self, x: Tensor) -> Tensor:
        """The one that does not hold x."""
        return self.first if x is self.second else self.second


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
        return orthogonal(x, kept, rule, rates), 1.0
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
            x = along(x, side, symmetric(kept, "root", position), scratch.beside(x))
        x = x.to(exact)
    return (orthogonal(x, kept, rule, rates), 1.0) if rule.then else (x, size)


def turned(x: Tensor, kept: Kept, rule: Rule, scratch: Scratch, *, back: bool) -> Tensor:
    """x in the eigenbases of its sides, or back from them, in scratch."""
    exact = x.dtype
    x, scratch = _cast(x, rule, scratch)
    for position, side in enumerate(rule.sides):
        basis = kept[f"basis{position}"]
        x = along(x, side, basis if back else basis.mT, scratch.beside(x))
    return x.to(exact)


def along(x: Tensor, side: int, matrices: Tensor | Symmetric, out: Tensor) -> Tensor:
    """x (B, d1 .. dr) times matrices (B, d, d) along one side, into out, which is not x.

    A middle side of three or more takes two copies.
    """
    is_last = side == x.ndim - 2
    if isinstance(matrices, Symmetric):
        parts = [part.to(x.dtype) for part in matrices.parts()]
        if len(parts) == 2 and (side == 0 or is_last):
            Symmetric(*parts).multiply(unfold(x, side), unfold(out, side))
            return out
        if len(parts) == 2:
            moved = unfold(x, side)
            return _fold(out, Symmetric(*parts).multiply(moved, torch.empty_like(moved)), side)
        [matrix] = transposed = parts
    else:
        matrix = matrices.to(x.dtype)
        transposed = [matrix.mT] if is_last and side else []
    if x.ndim == 2:
        torch.bmm(matrix, x[:, :, None], out=out[:, :, None])
    elif side == 0:
        torch.bmm(matrix, x.flatten(2), out=out.flatten(2))
    elif is_last:
        torch.bmm(x.flatten(1, -2), transposed[0], out=out.flatten(1, -2))
    else:
        _fold(out, torch.bmm(matrix, unfold(x, side)), side)
    return out


def unfold(x: Tensor, side: int) -> Tensor:
    """(B, d1 .. dr) -> (B, d, rest) along one side; a view for the first and the last."""
    if x.ndim == 2:
        return x[:, :, None]
    if side == 0:
        return x.flatten(2)
    if side == x.ndim - 2:
        return x.flatten(1, -2).mT
    return x.movedim(side + 1, 1).flatten(2)


def orthogonal(x: Tensor, kept: Kept, rule: Rule, rates: Rates) -> Tensor:
    """The orthogonal factor of each block seen as a matrix (d1, rest), sized for its shape."""
    matrices = x.flatten(2)
    m, n = matrices.shape[1:]
    factors = orthogonalize(matrices.to(rule.products or x.dtype), rule.iterations, rule.coefficients).to(
        x.dtype
    )
    size = {"match_rms": 0.2 * max(m, n) ** 0.5, "original": max(1.0, m / n) ** 0.5, None: 1.0}[rule.scale]
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


def _finish(step: Tensor, size: Rate, kept: Kept, rule: Rule, rates: Rates) -> Tensor:
    """Clip, take into the momentum after preconditioning, and multiply by -lr."""
    if rates.clip is not None and rule.direction == "diagonal":
        pieces = step.mul_(size).split(rule.lengths)
        means = torch.stack([piece.square().mean().sqrt() for piece in pieces])
        torch._foreach_mul_(pieces, list((rates.clip / means.clamp_min(1e-30)).clamp_max(1.0).unbind()))
        size = 1.0
    elif rates.clip is not None:
        means = lengths(step) * size * prod(step.shape[1:]) ** -0.5
        size = size * (rates.clip / means.clamp_min(1e-30)).clamp_max(1.0)
    if "velocity" not in kept:
        return step.mul_(size * -rates.lr)
    step = step.mul_(size * rates.keep)
    velocity = kept["velocity"].mul_(rates.velocity).add_(step)
    step = step.add_(velocity * rates.velocity) if rule.nesterov else velocity.clone()
    return step.mul_(-rates.lr)


def _cast(x: Tensor, rule: Rule, scratch: Scratch) -> tuple[Tensor, Scratch]:
    """x and scratch for products in the rule's dtype."""
    if rule.products is None or rule.products == x.dtype:
        return x, scratch
    x = x.to(rule.products)
    return x, Scratch(x, torch.empty_like(x))


def _fold(out: Tensor, unfolded: Tensor, side: int) -> Tensor:
    """Copy (B, d, rest) into (B, d1 .. dr), the reverse of `unfold`."""
    moved = out.movedim(side + 1, 1)
    moved.copy_(unfolded.view(moved.shape))
    return out


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))
