"""Roots and bases from factors: where they begin, and how they are found anew.

What is done here costs n³ and happens to a few blocks a step; on the CPU every temporary matrix shows.
"""

from __future__ import annotations

from math import log, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stretto.optim import roots
from stretto.optim.directions import Kept, Rule, Scratch, along, symmetric
from stretto.optim.symmetric import Rate, gram_halves, halved, over

if TYPE_CHECKING:
    from stretto.optim.buckets import Bucket


def power(rule: Rule, group: dict[str, Any], position: int, order: int) -> float:
    """The exponent p of one side's factor: as given, for all orders or for this one, or the usual one."""
    given = group["power"]
    if isinstance(given, dict):
        given = given.get(order)
    if isinstance(given, tuple | list):
        axes = [rule.axes[side] for side in rule.sides]
        given = given[sorted(axes).index(axes[position])]
    if given is not None:
        return float(given)
    if rule.direction == "kl" or len(rule.sides) == 1:
        return 0.5
    return 0.5 / len(rule.sides)


def named(name: str, position: int, parts: list[Tensor]) -> Kept:
    """The parts of a symmetric matrix under their names."""
    return {f"{name}{position}" + ("_rest" if i else ""): part for i, part in enumerate(parts)}


def remainder(beta: float, count: int | Tensor) -> Rate:
    """1 - beta^count, the weights of an average that began at zero; in float32 too exact where beta is near 1."""
    if isinstance(count, Tensor) and beta > 0:
        return -torch.expm1(count * log(beta))
    return 1 - beta**count


def begin(bucket: Bucket, gradient: Tensor) -> None:
    """Where nothing was accumulated yet: multiples of the identity that bring the gradient to a usual size."""
    rule, group, kept = bucket.rule, bucket.group, bucket.kept
    if rule.direction == "soap":
        return
    squares = gradient.flatten(1).square().sum(dim=1)
    fresh = (kept["factor0"] == 0).flatten(1).all(dim=1) & (squares > 0)
    for position, side in enumerate(rule.sides):
        if rule.direction == "kl":
            size = (squares / prod(bucket.dims)) ** (-0.5 / len(rule.sides))
        else:
            shared = 1 - 1 / len(rule.sides) if group["trace_scaling"] else 0.0
            exponent = power(rule, group, position, len(bucket.dims))
            size = (squares ** (1 - shared) / bucket.dims[side]) ** -exponent
        if rule.direction == "eigen":
            name = f"powers{position}"
            _replace(kept, fresh, {name: size[:, None].expand_as(kept[name])})
            continue
        parts = halved(torch.eye(bucket.dims[side], dtype=bucket.dtype, device=bucket.device)[None])
        _replace(kept, fresh, named("root", position, [size[:, None, None] * part for part in parts]))
        if rule.direction == "kl":
            # which has no zero to begin at: each factor needs the inverse of the others
            theirs = [size[:, None, None] ** -2 * part for part in parts]
            _replace(kept, fresh, named("factor", position, theirs))


def refresh(bucket: Bucket, rows: list[int], keep: Tensor | None) -> None:
    """New roots or bases of these blocks, from their factors; where that fails, or keep is 0, the old ones stay."""
    rule, kept = bucket.rule, bucket.kept
    index = bucket.index(rows)
    scale = _scale(bucket, index)
    found: Kept = {}
    values = []
    succeeded = torch.ones(len(rows), dtype=torch.bool, device=bucket.device)
    empty = ~succeeded
    for position in range(len(rule.sides)):
        new, eigenvalues, converged, is_zero = _side(bucket, position, rows, index, scale)
        found |= new
        values.append(eigenvalues)
        succeeded, empty = succeeded & converged, empty | is_zero
    succeeded = succeeded & ~empty
    skipped = torch.zeros_like(empty) if keep is None else (keep <= 0).expand_as(empty)
    succeeded = succeeded & ~skipped
    if rule.direction == "soap":
        _turn(
            bucket,
            [found[f"basis{position}"] for position in range(len(rule.sides))],
            values,
            index,
            succeeded,
        )
    _replace(kept, succeeded, found, index)
    kept["refreshed"][index] += succeeded
    failures = kept["failures"][index]
    counted = torch.where(succeeded | empty, 0, failures + 1).to(failures.dtype)
    kept["failures"][index] = torch.where(skipped, failures, counted)
    if bucket.device.type == "cpu":
        bucket.look()


def _scale(bucket: Bucket, index: Tensor) -> Rate:
    """What every side's factors are to be multiplied by: one over their bias, and over their share of the trace."""
    group, rule = bucket.group, bucket.rule
    scale: Rate = 1.0
    if group["bias_correction"] and group["betas"][1] < 1 and rule.direction != "kl":
        updates = bucket.number("updates")
        count = bucket.of(updates, index) if isinstance(updates, Tensor) else updates
        scale = 1 / remainder(group["betas"][1], count)
    if group["trace_scaling"]:
        factor = symmetric(bucket.kept, "factor", 0)
        diagonals = [part[index].diagonal(offset, 1, 2) for part, offset in factor.diagonals()]
        trace = torch.cat(diagonals, dim=1).to(bucket.dtype).sum(dim=1)
        scale = scale * (scale * trace).clamp_min(1e-30) ** (1 / len(rule.sides) - 1)
    return scale


def _side(
    bucket: Bucket, position: int, rows: list[int], index: Tensor, scale: Rate
) -> tuple[Kept, Tensor, Tensor, Tensor]:
    """What is new of one side, by name; eigenvalues (K, n) where they are found; converged and zero (K,)."""
    group, rule = bucket.group, bucket.rule
    factor = symmetric(bucket.kept, "factor", position).rows(index, bucket.dtype)
    solver: Any = bucket.solver(position)
    exponent, ridge = power(rule, group, position, len(bucket.dims)), (group["ridge"], group["ridge_eps"])
    if solver not in ("eigh", "qr"):
        is_zero = factor.diagonal(dim1=1, dim2=2).sum(dim=1) <= 0
        factor = factor * over(scale, factor)
        root, converged = roots.inverse_root(factor, exponent, solver=solver, ridge=ridge[0], eps=ridge[1])
        none = factor.new_empty(0)
        return named("root", position, halved(root)), none, converged, is_zero
    values, vectors, converged = _eigen(bucket, position, factor, rows, index)
    values = values * over(scale, values)
    is_zero = converged & (values.sum(dim=1) <= 0)
    found = {f"basis{position}": vectors}
    if rule.direction == "soap":
        return found, values, converged, is_zero
    powers = roots.eigenvalue_powers(values, exponent, *ridge)
    if rule.direction == "eigen":
        return found | {f"powers{position}": powers}, values, converged, is_zero
    if f"basis{position}" not in bucket.kept:
        found = {}
        vectors.mul_(powers.sqrt()[:, None, :])
    else:
        vectors = vectors * powers.sqrt()[:, None, :]
    return found | named("root", position, gram_halves(vectors)), values, converged, is_zero


def _eigen(
    bucket: Bucket, position: int, factor: Tensor, rows: list[int], index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and vectors: exact at first, later one orthogonal iteration from the last vectors."""
    if bucket.solver(position) == "eigh" or not all(bucket.ready[row] for row in rows):
        return roots.eigh(factor)
    bases, tolerance = bucket.kept[f"basis{position}"][index].to(bucket.dtype), bucket.group["tolerance"]
    if not tolerance:
        return roots.orthogonal_iteration(factor, bases)
    stale = roots.off_diagonal(factor, bases) > tolerance
    values, vectors = (factor @ bases).mul_(bases).sum(dim=1), bases.clone()
    converged = torch.ones_like(stale)
    if stale.any():
        values[stale], vectors[stale], converged[stale] = roots.orthogonal_iteration(
            factor[stale], bases[stale]
        )
    return values, vectors, converged


def _turn(
    bucket: Bucket, bases: list[Tensor], values: list[Tensor], index: Tensor, succeeded: Tensor
) -> None:
    """Take what lives in the old bases of these blocks into the new ones.

    The momentum turns with its basis. Second moments turn as if they were independent, which is exact where columns
    trade places; at the first refresh, from the identity, they are what the factors say they are: the product of
    eigenvalues (of a side without a factor, its marginal) over the power of the trace.
    """
    sides, order = bucket.rule.sides, len(bucket.dims)
    kept: Kept = {name: bucket.kept[name][index] for name in ("momentum", "second") if name in bucket.kept}
    first = bucket.kept["refreshed"][index] == 0
    if bucket.device.type != "cpu" or first.any():
        estimate = torch.ones_like(kept["second"])
        for side in range(order):
            if side in sides:
                marginal = values[sides.index(side)].clamp_min(0)
            else:
                marginal = kept["second"].sum(dim=[1 + other for other in range(order) if other != side])
            share = marginal / marginal.sum(dim=1, keepdim=True).clamp_min(1e-30)
            estimate *= share.view(len(share), *[-1 if other == side else 1 for other in range(order)])
        steps = bucket.number("step")
        count = bucket.of(steps, index) if isinstance(steps, Tensor) else steps
        # of what is in the second moment, without this step's
        weights = remainder(bucket.group["betas"][1], count - 1)
        estimate *= over(values[0].clamp_min(0).sum(dim=1) * weights, estimate)
    for position, (side, basis) in enumerate(zip(sides, bases)):
        turn = basis.mT @ bucket.kept[f"basis{position}"][index].to(bucket.dtype)
        for name, rows in kept.items():
            kept[name] = along(rows, side, turn if name == "momentum" else turn.square_(), Scratch(rows))
    if bucket.device.type != "cpu" or first.any():
        kept["second"] = torch.where(over(first, estimate), estimate, kept["second"])
    _replace(bucket.kept, succeeded, kept, index)


def _replace(kept: Kept, where: Tensor, new: Kept, index: Tensor | None = None) -> None:
    """Rows of what is kept under these names, of all blocks or of those in index, where a mask says so."""
    everywhere = where.device.type == "cpu" and bool(where.all())
    for name, rows in new.items():
        stack = kept[name]
        if not everywhere:
            old = stack if index is None else stack[index]
            rows = torch.where(over(where, old), rows.to(old.dtype), old)
        if index is None:
            stack.copy_(rows)
        else:
            stack[index] = rows.to(stack.dtype)
