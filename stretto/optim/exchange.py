"""Blocks between ranks: gradients to their owners, steps back to all who hold a part of the weights.

One mechanism for every parallelism. The ranks that hold a parameter are a grid of replicas x shards. Along a row
(one copy of the parameter) pieces of gradients go to the owners of that row and pieces of steps come back, each by one
all_to_all; along a column (ranks with equal shards) what a row has found goes to the others, by one all_gather. Under
DDP a row is one rank and nothing but that all_gather is left; under FSDP a column is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.optim.buckets import Bucket
from stretto.optim.layout import ALONE, Grid, Layout, Placement
from stretto.optim.regions import Box

WAVE = 1 << 25  # entries of a shard that travel together; the next ones travel while these are computed
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name


@dataclass(frozen=True)
class Seat:
    """A rank's place on a grid, and whom it shares a row and a column with."""

    grid: Grid = ALONE
    number: int = 0  # row * shards + column
    row: Any = None  # process groups, None where there is no other rank
    column: Any = None
    meshed: bool = False  # whether it is one of a mesh, whose parameters are DTensors

    @property
    def shard(self) -> int:
        """Which part of each parameter is here."""
        return self.number % self.grid.shards

    @property
    def replica(self) -> int:
        """The row."""
        return self.number // self.grid.shards


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is placed on a mesh."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, in vain where nobody has one
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def gradient(p: Any) -> Tensor | None:
    """This rank's shard of a parameter's gradient, placed as the parameter is."""
    grad = p.grad
    if is_dtensor(grad) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return None if grad is None else local(grad)


def locate(p: Any, group: Any, seats: dict[Any, Seat]) -> tuple[Placement, Seat]:
    """Where a parameter lies, and this rank's seat among those that hold it; seats found so far are reused.

    group: the ranks that hold equal plain tensors and share their work, or None. Raises ValueError for a mesh whose
    ranks do not rise, for one without names where several of its dims cut a parameter, and for partial sums.
    """
    if not is_dtensor(p):
        if group is None or group.size() == 1:
            return Placement(), seats.setdefault(None, Seat())
        if group not in seats:
            ranks = tuple(dist.get_process_group_ranks(group))
            seats[group] = Seat(Grid(ranks), dist.get_rank(group), None, group)
        return Placement(seats[group].grid), seats[group]
    mesh, placements = p.device_mesh, p.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a parameter has placements {placements}; partial sums cannot be stepped")
    cutting = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    key = (mesh, tuple(cutting))
    if key not in seats:
        seats[key] = _seat(mesh, cutting)
    order = sorted(cutting, key=lambda i: hasattr(placements[i], "split_factor"))  # those are cut last
    cuts = tuple((getattr(placements[i], "dim", 0), cutting.index(i)) for i in order)
    return Placement(seats[key].grid, cuts), seats[key]


def _seat(mesh: Any, cutting: list[int]) -> Seat:
    copying = [i for i in range(mesh.ndim) if i not in cutting]
    ranks = mesh.mesh.permute(copying + cutting)
    digits = tuple(mesh.size(i) for i in cutting)
    grid = Grid(tuple(ranks.flatten().tolist()), digits)
    number = grid.ranks.index(dist.get_rank())
    rows = ranks.reshape(grid.replicas, grid.shards)
    # the ranks of a group rise, whatever the mesh says
    if any((rows.diff(dim=dim) <= 0).any() for dim in (0, 1)):
        listed = mesh.mesh.tolist()
        raise ValueError(f"the mesh {listed} has ranks that do not rise along its dims; sort them")
    return Seat(grid, number, _group(mesh, cutting), _group(mesh, copying), meshed=True)


def _group(mesh: Any, dims: list[int]) -> Any:
    """The group of these dims of a mesh; None where it is one rank."""
    dims = [i for i in dims if mesh.size(i) > 1] or dims[:1]
    if not dims or prod(mesh.size(i) for i in dims) == 1:
        return None
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if mesh.mesh_dim_names is None:
        raise ValueError(f"the mesh {mesh} has no names for its dims; give it mesh_dim_names")
    if len(dims) < mesh.ndim:
        mesh = mesh[tuple(mesh.mesh_dim_names[i] for i in dims)]
    return mesh._flatten().get_group()


# ------------------------------------------------------------------------------------------------ what travels


class Part(NamedTuple):
    """A part of a rank's shard of a parameter: a box of a region's dims, or a run of entries."""

    bucket: int
    member: int
    box: Box | None  # of the shard, in the region's kept order
    run: tuple[int, int] = (0, 0)  # start and count of the flattened shard, where there is no box

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what travels."""
        return self.box[1] if self.box is not None else self.run[1:]


class Row(NamedTuple):
    """A part of a row of a bucket's stack."""

    bucket: int
    row: int
    box: Box


class Shards:
    """Views of parts of some shards: the local tensors of parameters, gradients or what rounding left off."""

    def __init__(self, buckets: Sequence[Bucket], layout: Layout, seat: Seat) -> None:
        self.buckets, self.layout, self.seat = buckets, layout, seat

    def views(self, parts: Sequence[Part], tensors: dict[Tensor, Tensor | None]) -> list[Tensor]:
        """Of each part; tensors has the shard of each parameter, None where there is none, which counts as zeros."""
        found: dict[tuple[int, int], Tensor] = {}
        views = []
        for part in parts:
            at = part[:2]
            if at not in found:
                found[at] = self._whole(part, tensors)
            view = found[at]
            if part.box is None:
                views.append(view[part.run[0] : part.run[0] + part.run[1]])
            else:
                views.append(view[_slices(part.box)])
        return views

    def _whole(self, part: Part, tensors: dict[Tensor, Tensor | None]) -> Tensor:
        bucket = self.buckets[part.bucket]
        p, region = bucket.params[part.member], bucket.regions[part.member]
        tensor = tensors[p]
        if tensor is None:
            tensor = torch.zeros((), dtype=p.dtype, device=p.device).expand(local(p).shape)
        if part.box is None:
            return tensor.reshape(-1)
        box = self.layout.box(region, self.seat.shard)
        assert box is not None
        order = [region.axes.index(dim) for dim in range(len(region.axes))]
        return tensor.reshape([box[1][dim] for dim in order]).permute(region.axes)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(*box))


class Message(NamedTuple):
    """One collective on its way: what it fills, cut as it is to be read, and its handle."""

    pieces: list[list[Tensor]]  # flat, by rank of the group
    work: Any


class Wave:
    """Buckets whose gradients and steps travel together: of one seat, dtype and device.

    Call `send`, `receive`, `give` and `take` in this order; each collective is under way between the first two and the
    last two.
    """

    def __init__(
        self, buckets: list[Bucket], layout: Layout, seat: Seat, transport: torch.dtype | None
    ) -> None:
        self.buckets, self.seat, self.transport = buckets, seat, transport
        self.shards = Shards(buckets, layout, seat)
        grid, shard, mine = seat.grid, seat.shard, seat.number
        here: list[list[Part]] = [[] for _ in grid.ranks]  # parts of this shard, by owner
        rows: list[list[Row]] = [
            [] for _ in range(grid.shards)
        ]  # of this rank's stacks, by the shard they come from
        for b, bucket in enumerate(buckets):
            row = 0
            for m, region in enumerate(bucket.regions):
                if not region.dims:
                    for number in range(len(grid.ranks)):
                        if number % grid.shards == shard and (number == mine or layout.shared(region)):
                            here[number].append(Part(b, m, None, layout.entries(region, number)))
                    continue
                owners, box = layout.owners[region.index, region.part], layout.box(region, shard)
                for piece in () if box is None else region.pieces(box):
                    here[owners[piece.block]].append(Part(b, m, piece.local))
                owned = {block: row + i for i, block in enumerate(layout.owned(region, mine))}
                for other in range(grid.shards) if owned else ():
                    theirs = layout.box(region, other)
                    if theirs is not None:
                        common = ((at, _common(region.box(block), theirs)) for block, at in owned.items())
                        rows[other] += [Row(b, at, inside) for at, inside in common if inside is not None]
                row += len(owned)
        first = seat.replica * grid.shards
        # by column: parts whose blocks are owned in this row; the entries that are stepped where they lie come last
        self.parts = [[p for p in here[first + column] if p.box is not None] for column in range(grid.shards)]
        self.entries = [p for p in here[mine] if p.box is None]
        self.rows = rows
        # by row of the grid: what its ranks of this column have to give to the others
        self.given = [
            sorted(p for column in range(grid.shards) for p in here[row * grid.shards + column])
            for row in range(grid.replicas)
        ]
        self.alone: list[Part] = []  # entries of which every replica steps its own copy
        if grid.replicas > 1:
            shared = {(b, m) for b, bucket in enumerate(buckets) for m, r in enumerate(bucket.regions)
                      if r.dims or layout.shared(r)}  # fmt: skip
            self.alone = [p for p in self.entries if p[:2] not in shared]
            self.given = [[p for p in parts if p[:2] in shared] for parts in self.given]
        self.largest = max(sum(prod(p.shape) for p in parts) for parts in self.given)

    # -- gradients to their owners

    def send(self, gradients: dict[Tensor, Tensor | None]) -> None:
        """Start the gradients on their way."""
        self.gradients = gradients
        found = [self.shards.views(parts, gradients) for parts in self.parts]
        self.own = found[self.seat.shard]
        dtype = self.transport or self.buckets[0].params[0].dtype
        if self.buckets[0].group["decay"] == "l2":
            dtype = self.transport or self.buckets[0].dtype
        sizes = [[prod(row.box[1]) for row in rows] for rows in self.rows]
        self.message = self._along_row(found, sizes, dtype)

    def receive(self) -> list[Tensor]:
        """The gradients of what is stepped here, a stack for each bucket."""
        pieces = _wait(self.message)
        stacks = [bucket.stack(*bucket.dims) for bucket in self.buckets]
        targets, sources = [], []
        for column, rows in enumerate(self.rows):
            views = self.own if column == self.seat.shard else pieces[column]
            for row, view in zip(rows, views):
                targets.append(stacks[row.bucket][row.row][_slices(row.box)])
                sources.append(view.view(targets[-1].shape) if column != self.seat.shard else view)
        starts = [0] * len(self.buckets)
        for part, view in zip(self.entries, self.shards.views(self.entries, self.gradients)):
            start = starts[part.bucket]
            targets.append(stacks[part.bucket][start : start + part.run[1]])
            sources.append(view)
            starts[part.bucket] += part.run[1]
        if targets:
            torch._foreach_copy_(targets, sources)
        del self.gradients, self.own, self.message
        return stacks

    # -- steps to all who hold the weights

    def give(self, steps: list[Tensor]) -> None:
        """Start the steps on their way; one for each bucket, as their gradients were."""
        self.steps = steps
        found = [[steps[row.bucket][row.row][_slices(row.box)] for row in rows] for rows in self.rows]
        self.own = found[self.seat.shard]
        sizes = [[prod(part.shape) for part in parts] for parts in self.parts]
        self.message = self._along_row(found, sizes, self.transport or self.buckets[0].dtype)

    def take(self) -> list[tuple[Part, Tensor]]:
        """The steps of all of this rank's shards, part by part."""
        pieces = _wait(self.message)
        pieces[self.seat.shard] = self.own
        ready = [
            (part, view.view(part.shape) if column != self.seat.shard else view)
            for column, (parts, views) in enumerate(zip(self.parts, pieces))
            for part, view in zip(parts, views)
        ]
        starts = [0] * len(self.buckets)
        for part in self.entries:
            start = starts[part.bucket]
            ready.append((part, self.steps[part.bucket][start : start + part.run[1]]))
            starts[part.bucket] += part.run[1]
        del self.steps, self.own, self.message
        return ready if self.seat.column is None else self._along_column(ready)

    def _along_column(self, ready: list[tuple[Part, Tensor]]) -> list[tuple[Part, Tensor]]:
        dtype, device = self.transport or self.buckets[0].dtype, self.buckets[0].device
        found = dict(ready)
        kept = [(part, found[part]) for part in self.alone]
        if not self.largest:
            return kept
        mine = torch.empty(self.largest, dtype=dtype, device=device)
        parts = self.given[self.seat.replica]
        sizes = [prod(part.shape) for part in parts]
        if parts:
            flat = mine[: sum(sizes)].split(sizes)
            torch._foreach_copy_(
                [view.view(part.shape) for part, view in zip(parts, flat)], [found[part] for part in parts]
            )
        gathered = torch.empty(len(self.given) * self.largest, dtype=dtype, device=device)
        _all_gather(gathered, mine, group=self.seat.column)
        for parts, buffer in zip(self.given, gathered.split(self.largest)):
            sizes = [prod(part.shape) for part in parts]
            flat = buffer[: sum(sizes)].split(sizes) if parts else ()
            kept += [(part, view.view(part.shape)) for part, view in zip(parts, flat)]
        return kept

    def _along_row(self, found: list[list[Tensor]], sizes: list[list[int]], dtype: torch.dtype) -> Message:
        """Send views to the ranks of the row, and make room for what they send, of these sizes, by column."""
        if self.seat.row is None:
            return Message([[] for _ in found], None)
        found = [[] if column == self.seat.shard else views for column, views in enumerate(found)]
        sizes = [[] if column == self.seat.shard else theirs for column, theirs in enumerate(sizes)]
        device = self.buckets[0].device
        out = torch.empty(sum(v.numel() for views in found for v in views), dtype=dtype, device=device)
        into = torch.empty(sum(map(sum, sizes)), dtype=dtype, device=device)
        views = [view for views in found for view in views]
        if views:
            flat = out.split([view.numel() for view in views])
            torch._foreach_copy_([one.view(view.shape) for one, view in zip(flat, views)], views)
        work = dist.all_to_all_single(
            into,
            out,
            [sum(theirs) for theirs in sizes],
            [sum(view.numel() for view in views) for views in found],
            group=self.seat.row,
            async_op=True,
        )
        cut = iter(into.split([size for theirs in sizes for size in theirs]) if len(into) else ())
        return Message([[next(cut) for _ in theirs] for theirs in sizes], work)


def _wait(message: Message) -> list[list[Tensor]]:
    if message.work is not None:
        message.work.wait()
    return list(message.pieces)


def _common(block: Box, box: Box) -> Box | None:
    """What a block and a box have in common, as a box of the block."""
    starts, sizes = [], []
    for first, size, other, length in zip(*block, *box):
        low, high = max(first, other), min(first + size, other + length)
        if low >= high:
            return None
        starts.append(low - first)
        sizes.append(high - low)
    return tuple(starts), tuple(sizes)


def waves(
    buckets: Sequence[Bucket], seats: Sequence[Seat], layout: Layout, transport: torch.dtype | None
) -> list[Wave]:
    """Buckets with their seats as waves, the same ones in the same order on every rank of a grid."""
    open_: dict[Any, list[Bucket]] = {}
    sizes: dict[Any, int] = {}
    closed: list[tuple[list[Bucket], Seat]] = []
    for bucket, seat in zip(buckets, seats):
        key = (seat, bucket.params[0].dtype, bucket.device, bucket.group["decay"] == "l2")
        open_.setdefault(key, []).append(bucket)
        sizes[key] = sizes.get(key, 0) + sum(region.numel for region in bucket.regions) // seat.grid.shards
        if sizes[key] >= WAVE:
            closed.append((open_.pop(key), seat))
            del sizes[key]
    closed += [(members, key[0]) for key, members in open_.items()]
    return [Wave(members, layout, seat, transport) for members, seat in closed]


# --------------------------------------------------------------------------------------------------- agreeing


def agree(flags: Tensor, seats: Sequence[Seat]) -> Tensor:
    """The largest of each flag over all ranks that share work, in place."""
    widest = max(seats, key=lambda seat: len(seat.grid.ranks))
    for group in (widest.row, widest.column):
        if group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return flags


def total(seat: Seat, shared: bool) -> Callable[[Tensor], Tensor] | None:
    """The sum over the parts of a parameter: of its shards, and of replicas that share its entries."""
    groups = [seat.row] if not shared else [seat.row, seat.column]
    groups = [group for group in groups if group is not None]
    if not groups:
        return None

    def add(sums: Tensor) -> Tensor:
        for group in groups:
            dist.all_reduce(sums, group=group)
        return sums

    return add


def over_shards(sums: Tensor, params: Sequence[Any]) -> Tensor:
    """Sums (K,) over this rank's shards of K parameters, over all of their shards, in place."""
    found: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if is_dtensor(p):
            cut = tuple(dim for dim, placement in enumerate(p.placements) if not placement.is_replicate())
            found.setdefault((p.device_mesh, cut), []).append(i)
    for (mesh, cut), indices in found.items():
        mine = sums[indices]
        for dim in cut:
            dist.all_reduce(mine, group=mesh.get_group(dim))
        sums[indices] = mine
    return sums


def check_equal(facts: list[str], what: str, seats: Sequence[Seat]) -> None:
    """Raise the same ValueError on every rank where one has other facts than the first; a line of each thing (what).

    A collective: every rank that shares work calls it.
    """
    widest = max(seats, key=lambda seat: len(seat.grid.ranks))
    found: dict[int, list[str]] = {dist.get_rank(): facts} if dist.is_initialized() else {}
    for group in (widest.row, widest.column):
        if group is not None:
            theirs: list[Any] = [None] * group.size()
            dist.all_gather_object(theirs, found, group=group)
            found = {rank: them for one in theirs for rank, them in one.items()}
    ranks = sorted(found)
    for rank in ranks[1:]:
        first, other = found[ranks[0]], found[rank]
        if first == other:
            continue
        if len(first) != len(other):
            difference = f"{len(other)} {what} and rank {ranks[0]} has {len(first)}"
        else:
            mine, its = next((a, b) for a, b in zip(first, other) if a != b)
            difference = f"{its} where rank {ranks[0]} has {mine}"
        raise ValueError(
            f"rank {rank} has {difference}; every rank must be given the same model and the same options"
        )
