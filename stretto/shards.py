"""What the rest needs to know of DTensors: this rank's shard, the whole, writing a part, a joint norm.

Meshes of any dimensions; shards may be uneven or empty, and cut twice along one side (tensor parallel, then FSDP).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(t: Any) -> TypeIs[DTensor]:
    """Whether t is a DTensor, replicated ones included."""
    module = sys.modules.get("torch.distributed.tensor")  # a second to import, in vain where nobody has one
    return module is not None and isinstance(t, module.DTensor)


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    return t.to_local() if is_sharded(t) else t


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """The full tensor, a collective of all ranks for a DTensor; any other tensor as it is."""
    return t.full_tensor() if is_sharded(t) else t


@torch.no_grad()
def write(p: Tensor, value: Tensor) -> None:
    """Write this rank's part of a full value into p, in place, without communication."""
    local(p).copy_(part(p, value))


def part(p: Tensor, value: Tensor) -> Tensor:
    """What this rank holds of a full value, were it laid out as p: a view where it is cut once a side."""
    if not is_sharded(p):
        return value
    coordinate = p.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank holds nothing of the tensor"
    for placement, ranks, rank in zip(p.placements, p.device_mesh.shape, coordinate):
        if isinstance(dim := getattr(placement, "dim", None), int):
            # tensor parallel cut first: a piece of each of its shards, side by side
            pieces = _cut(value, getattr(placement, "split_factor", 1), dim)
            mine = [_cut(piece, ranks, dim)[rank] for piece in pieces]
            value = mine[0] if len(mine) == 1 else torch.cat(mine, dim)
    return value


def _cut(value: Tensor, count: int, dim: int) -> list[Tensor]:
    """As torch.chunk, with empty ones at the end where it gives fewer."""
    size = -(-value.shape[dim] // count)
    bounds = [min(n * size, value.shape[dim]) for n in range(count + 1)]
    return [value.narrow(dim, begin, end - begin) for begin, end in pairwise(bounds)]


@torch.no_grad()
def norm(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The joint 2-norm as a plain 0-d tensor, each entry counted once whatever meshes the tensors lie on.

    dtype: of the sums, else float32 or better. Costs one collective for each dim of a mesh that something is cut
    along; nothing syncs with the host. At least one tensor, the same ones on every rank.
    """
    tensors = list(tensors)
    dtype = dtype or functools.reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    norms = torch._foreach_norm([local(t) for t in tensors], 2, dtype=dtype)
    by_mesh: dict[Any, list[int]] = {}
    for n, t in enumerate(tensors):
        by_mesh.setdefault(t.device_mesh if is_sharded(t) else None, []).append(n)
    joint = [
        _over_mesh(mesh, [tensors[n] for n in ns], [norms[n] for n in ns]) for mesh, ns in by_mesh.items()
    ]
    return joint[0] if len(joint) == 1 else torch.linalg.vector_norm(torch.stack(joint))


def _over_mesh(mesh: Any, tensors: list[Any], norms: list[Tensor]) -> Tensor:
    """The joint norm of tensors on one mesh from those of their shards; mesh None: plain tensors."""
    if mesh is None:
        return torch.linalg.vector_norm(torch.stack(norms))
    assert not any(place.is_partial() for t in tensors for place in t.placements), "sums of ranks are due"
    cut = [dim for dim in range(mesh.ndim) if any(not t.placements[dim].is_replicate() for t in tensors)]
    replicas = [prod(mesh.size(dim) for dim in cut if t.placements[dim].is_replicate()) for t in tensors]
    alone = [norm if count == 1 else norm / count**0.5 for norm, count in zip(norms, replicas)]
    square = torch.linalg.vector_norm(torch.stack(alone)).square()
    for dim in cut:
        dist.all_reduce(square, group=mesh.get_group(dim))
    return square.sqrt()
