"""What lies where: the blocks of all parameters, who owns which, what that costs and what has to travel.

Pure data, from shapes and plain values alone: the layout of a thousand ranks is made without any of them.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from stretto.optim.regions import EIGH, Box, Region, Shape
from stretto.optim.traffic import Traffic, count_traffic

Key = tuple[int, int]  # of a region: the parameter's index, and its part
SPLIT = 1 << 16  # entries from which on replicas share the diagonal rule's work on a parameter


@dataclass(frozen=True)
class Grid:
    """Ranks as replicas x shards: those of a row hold one copy between them, those of a column hold the same part."""

    ranks: tuple[int, ...] = (0,)  # row by row, rising
    digits: Shape = ()  # sizes of the mesh's dims that cut parameters; a shard's number is read off them

    @property
    def shards(self) -> int:
        """Ranks of a row."""
        return prod(self.digits)

    @property
    def replicas(self) -> int:
        """Rows."""
        return len(self.ranks) // self.shards


ALONE = Grid()


class Placement(NamedTuple):
    """How a parameter lies on a grid: by which digit of a shard's number each dim is cut, in the order of cutting.

    A dim is cut into parts of equal size, rounded up, so that the last ones may be shorter or empty.
    """

    grid: Grid = ALONE
    cuts: tuple[tuple[int, int], ...] = ()  # (dim, digit)

    def box(self, shape: Shape, shard: int) -> Box:
        """Which part of a parameter of this shape a shard is."""
        numbers: list[int] = []
        for size in reversed(self.grid.digits):
            shard, number = divmod(shard, size)
            numbers.insert(0, number)
        starts, sizes = [0] * len(shape), list(shape)
        for dim, digit in self.cuts:
            part = -(-sizes[dim] // self.grid.digits[digit])
            start = min(part * numbers[digit], sizes[dim])
            starts[dim], sizes[dim] = starts[dim] + start, min(part, sizes[dim] - start)
        return tuple(starts), tuple(sizes)


class Held(NamedTuple):
    """Which part of a whole a rank keeps: rows start : start + count lie at offsets, for each of the parts."""

    whole: Shape
    local: Shape
    parts: list[tuple[Shape, int, int]]  # (offsets, start, count)


class Layout(Sequence[Region]):
    """All regions of an optimizer, where parameters lie, and who owns which block; printed, a line a parameter.

    shapes, placements: of parameters by index; a parameter that is not named lies on the one rank there is.
    turns: of blocks, so that those of one step are spread over ranks. kept: bytes of state of each region.
    widths: bytes of an entry of a gradient, and of a step, when they travel.
    """

    def __init__(
        self,
        regions: list[Region],
        shapes: dict[int, Shape] | None = None,
        placements: dict[int, Placement] | None = None,
        *,
        every: Sequence[int] = (1,),
        turns: dict[Key, list[int]] | None = None,
        kept: dict[Key, int] | None = None,
        widths: tuple[int, int] = (4, 4),
    ) -> None:
        self.regions, self.shapes = regions, shapes or {}
        self.turns, self.widths = turns or {}, widths
        self.placements, self.kept, self.every = placements or {}, kept or {}, every
        self._boxes: dict[tuple[Shape, tuple[tuple[int, int], ...], Grid], list[Box]] = {}
        self.owners: dict[
            Key, list[int]
        ] = {}  # of blocks, by their number on the grid: row * shards + column
        families: dict[Grid, list[Region]] = defaultdict(list)
        for region in regions:
            if region.dims:
                families[self.placement(region).grid].append(region)
        for grid, members in families.items():
            self.owners |= self._assign(grid, members)

    def __getitem__(self, index: Any) -> Any:
        return self.regions[index]

    def __len__(self) -> int:
        return len(self.regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    def on(self, replicas: int = 1, shards: int = 1) -> Layout:
        """The same parameters on other ranks: so many replicas of each, cut along its first dim into so many shards.

        So DDP lays them, or fully_shard with one mesh dim or two; without any of those ranks.
        """
        grid = Grid(tuple(range(replicas * shards)), (shards,) if shards > 1 else ())
        placement = Placement(grid, ((0, 0),) if shards > 1 else ())
        shapes = {region.index: self.shapes.get(region.index, region.shape) for region in self}
        placements = {i: placement if shape else Placement(grid) for i, shape in shapes.items()}
        return Layout(
            self.regions,
            shapes,
            placements,
            every=self.every,
            turns=self.turns,
            kept=self.kept,
            widths=self.widths,
        )

    def placement(self, region: Region) -> Placement:
        """Where the parameter of a region lies."""
        return self.placements.get(region.index, Placement())

    def work(self, region: Region) -> float:
        """Operations of one of its blocks in a step."""
        return region.work(self.every[region.group] if region.group < len(self.every) else self.every[0])

    def _assign(self, grid: Grid, regions: list[Region]) -> dict[Key, list[int]]:
        """Owners by longest processing time: the costliest block goes to the rank that has least so far.

        Blocks of one cost go round by their turns, so that those which are refreshed at one step are spread.
        """
        owners = {(r.index, r.part): [0] * r.count for r in regions}
        count = len(grid.ranks)
        if count == 1:
            return owners
        blocks = sorted(
            (-self.work(r), self.turns.get((r.index, r.part), [0] * r.count)[b], r.index, r.part, b)
            for r in regions
            for b in range(r.count)
        )
        loads = [(0.0, rank) for rank in range(count)]
        for cost, _, index, part, block in blocks:
            load, rank = heapq.heappop(loads)
            owners[index, part][block] = rank
            heapq.heappush(loads, (load - cost, rank))
        return owners

    def box(self, region: Region, shard: int) -> Box | None:
        """A shard of the region's parameter, in its merged dims and kept order; None where it is empty."""
        shape, placement = self.shapes.get(region.index, region.shape), self.placement(region)
        key = (shape, placement.cuts, placement.grid)
        if key not in self._boxes:
            self._boxes[key] = [placement.box(shape, shard) for shard in range(placement.grid.shards)]
        return region.within(shape, self._boxes[key][shard])

    def owned(self, region: Region, number: int) -> list[int]:
        """The blocks of a region that a rank of its grid owns, by its number there."""
        return [
            block for block, owner in enumerate(self.owners[region.index, region.part]) if owner == number
        ]

    def loads(self, step: int | None = None) -> dict[int, float]:
        """Operations of each rank in a step, by global rank, those of the diagonal rule left out.

        On average over a refresh cycle, or at one of its steps, from 0.
        """
        loads: dict[int, float] = defaultdict(float)
        for region in self:
            if not region.dims:
                continue
            key, ranks = (region.index, region.part), self.placement(region).grid.ranks
            for owner, turn in zip(self.owners[key], self.turns.get(key, [0] * region.count)):
                if step is None:
                    loads[ranks[owner]] += self.work(region)
                else:
                    loads[ranks[owner]] += region.work(math.inf) + (turn == step) * EIGH * region.cost
        return dict(loads)

    def traffic(self) -> Traffic:
        """What travels in a step, by collective: print it. Messages of an all-gather are padded to the longest.

        Flags of which gradients are there and finite, a few bytes a parameter, come on top.
        """
        return count_traffic(self, self.widths)

    def state_bytes(self) -> dict[int, int]:
        """Bytes of state of each rank, by global rank, where `kept` is known; counters are counted as if divided."""
        held: dict[int, int] = defaultdict(int)
        for region in self:
            grid, whole = self.placement(region).grid, self.kept.get((region.index, region.part), 0)
            if region.dims:
                for owner in self.owners[region.index, region.part]:
                    held[grid.ranks[owner]] += whole // region.count
                continue
            for number, rank in enumerate(grid.ranks):
                held[rank] += whole * self.entries(region, number)[1] // region.numel
        return dict(held)

    def entries(self, region: Region, number: int) -> tuple[int, int]:
        """Of a region of order 0: where a rank's entries begin in its flattened shard, and how many there are.

        Replicas share those of large parameters, by rows of the shard.
        """
        placement, shape = self.placement(region), self.shapes.get(region.index, region.shape)
        row, shard = divmod(number, placement.grid.shards)
        sizes = placement.box(shape, shard)[1]
        if not self.shared(region) or not sizes or 0 in sizes:
            return 0, prod(sizes)
        part = -(-sizes[0] // placement.grid.replicas)
        start = min(part * row, sizes[0])
        return start * prod(sizes[1:]), min(part, sizes[0] - start) * prod(sizes[1:])

    def held(self, index: int, part: int, by_place: bool, rest: Shape, number: int) -> Held:
        """Which part a rank of a parameter's grid keeps: rows of a stack, or, by_place, of what is shaped as weights.

        rest: the dims of the whole after the first.
        """
        region = next(r for r in self if (r.index, r.part) == (index, part))
        placement, shape = self.placement(region), self.shapes.get(index, region.shape)
        starts, sizes = placement.box(shape, number % placement.grid.shards)
        if by_place:
            return Held(shape, sizes, [(starts, 0, sizes[0])] if shape and 0 not in sizes else [])
        if not region.dims:
            start, count = self.entries(region, number)
            return Held((region.numel,), (count,), runs(shape, (starts, sizes), start, count))
        owned = self.owned(region, number)
        zeros = (0,) * len(rest)
        parts = [((block, *zeros), row, 1) for row, block in enumerate(owned)]
        return Held((region.count, *rest), (len(owned), *rest), parts)

    def shared(self, region: Region) -> bool:
        """Whether replicas share the entries of a region of order 0."""
        return self.placement(region).grid.replicas > 1 and region.shape[0] >= SPLIT

    def phases(self, every: int, groups: set[int]) -> dict[tuple[int, int], list[int]]:
        """At which of `every` steps each block is refreshed, so that all steps cost about the same.

        By longest processing time first: the costliest block goes to the step that has least so far. Keys are
        (index, part) of the regions of these groups; equal costs follow the order of the layout.
        """
        blocks = sorted(
            (
                (r.cost, r.index, r.part, b)
                for r in self
                if r.sides and r.group in groups
                for b in range(r.count)
            ),
            key=lambda block: (-block[0], block[1:]),
        )
        loads = [(0, step) for step in range(every)]
        phases: dict[tuple[int, int], list[int]] = {
            (r.index, r.part): [0] * r.count for r in self if r.sides and r.group in groups
        }
        for cost, index, part, block in blocks:
            load, step = heapq.heappop(loads)
            phases[index, part][block] = step
            heapq.heappush(loads, (load + cost, step))
        return phases

    def __str__(self) -> str:
        lines = [("parameter", "shape", "blocks", "direction", "state bytes", "refresh n³", "owners")]
        total, numel = [0, 0], 0
        for _, group in itertools.groupby(self.regions, key=lambda region: region.index):
            regions = list(group)
            refresh = sum(region.count * region.cost for region in regions)
            bytes_ = sum(self.kept.get((r.index, r.part), 0) for r in regions)
            total, numel = [total[0] + bytes_, total[1] + refresh], numel + sum(r.numel for r in regions)
            blocks = " + ".join(_blocks(region) for region in regions)
            shape = "x".join(map(str, regions[0].shape)) or "scalar"
            lines.append(
                (
                    regions[0].name, shape, blocks, _direction(regions[0]), f"{bytes_:,}", f"{refresh:.2g}",
                    self._owners(regions),
                )
            )  # fmt: skip
        per = f"{total[0] / max(numel, 1):.1f} a parameter"
        lines.append((f"{numel:,} parameters", "", "", "", f"{total[0]:,} ({per})", f"{total[1]:.2g}", ""))
        if not any(owners for *_, owners in lines[1:]):
            lines = [line[:-1] for line in lines]  # type: ignore[misc]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)

    def _owners(self, regions: list[Region]) -> str:
        """Which ranks, in few words; nothing where there is one."""
        ranks = self.placement(regions[0]).grid.ranks
        if len(ranks) == 1:
            return ""
        if not regions[0].dims:
            return "all" if self.shared(regions[0]) else "each its own"
        found = sorted({ranks[owner] for r in regions for owner in self.owners[r.index, r.part]})
        return ", ".join(map(str, found)) if len(found) <= 8 else f"{len(found)} of {len(ranks)}"


def runs(shape: Shape, box: Box, start: int, count: int) -> list[tuple[Shape, int, int]]:
    """Entries start : start + count of a flattened box, as runs of the flattened whole: (offset,), start, count."""
    starts, sizes = box
    cut = max((dim for dim, size in enumerate(sizes) if size != shape[dim]), default=0)
    length = prod(sizes[cut:])
    found: list[tuple[Shape, int, int]] = []
    if not length:
        return found
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    for row, place in enumerate(itertools.product(*(range(s, s + n) for s, n in zip(starts[:cut], sizes)))):
        offset = sum(i * stride for i, stride in zip((*place, *starts[cut : cut + 1]), strides))
        low, high = max(start, row * length), min(start + count, (row + 1) * length)
        if low < high:
            found.append(((offset + low - row * length,), low - start, high - low))
    return found


def _blocks(region: Region) -> str:
    if not region.dims:
        return "entries"
    size = "x".join(map(str, region.dims))
    return f"{region.count} of {size}" if region.count > 1 else size


def _direction(region: Region) -> str:
    if not region.sides or len(region.sides) == len(region.dims):
        return region.direction
    return f"{region.direction} (side {', '.join(str(region.axes[side] + 1) for side in region.sides)})"
