"""What lies where: parameters as grids of equal blocks, which sides of a block are preconditioned, and what that costs.

Pure data, from shapes and plain values alone.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

SIDED = ("root", "eigen", "soap", "kl", "one_sided")  # directions with a factor for each preconditioned side
DIRECTIONS = (*SIDED, "spectral", "diagonal")
TABLES = re.compile(
    r"(^|[._])(emb|embeds?|embeddings?|wte|wpe|lm_head|head)([._]|$)"
)  # names of embeddings and heads
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A grid of equal blocks of one parameter; what a cut leaves over is another region.

    A region of order 0 has every entry for a block of its own, which is what the diagonal rule wants.
    """

    name: str
    index: int  # of the parameter, counted through all groups
    group: int
    part: int  # of the parameter's regions
    shape: Shape  # the parameter's after merging
    axes: Shape  # the order in which its dims are kept; what follows has that order
    start: Shape  # where the region begins, for each dim
    grid: Shape  # blocks for each dim
    dims: Shape  # of one block
    sides: tuple[int, ...]  # the dims that have a factor
    direction: str

    @property
    def count(self) -> int:
        """Blocks."""
        return prod(self.grid)

    @property
    def numel(self) -> int:
        """Entries of all blocks."""
        return self.count * prod(self.dims)

    @property
    def cost(self) -> int:
        """Of the refresh of one block: the sum of n³ over its sides."""
        return sum(self.dims[side] ** 3 for side in self.sides)

    def blocks(self, tensor: Tensor) -> Tensor:
        """The region of a tensor shaped like the parameter: (*grid, *dims), a view where strides allow one.

        A grid along the first dim alone is (count, *dims), and entries stay as they lie.
        """
        tensor = tensor.reshape(self.shape)
        if not self.dims:
            return tensor
        tensor = tensor.permute(self.axes)
        whole = tuple(tensor.shape)
        if whole[1:] == self.dims[1:] and whole[0] == self.grid[0] * self.dims[0]:
            return tensor.unflatten(0, (self.grid[0], self.dims[0]))
        for dim, (start, count, size) in enumerate(zip(self.start, self.grid, self.dims)):
            if count * size != whole[dim]:
                tensor = tensor.narrow(dim, start, count * size)
        for dim, (count, size) in reversed(list(enumerate(zip(self.grid, self.dims)))):
            tensor = tensor.unflatten(dim, (count, size))
        order = len(self.dims)
        return tensor.permute(*range(0, 2 * order, 2), *range(1, 2 * order, 2))


class Layout(Sequence[Region]):
    """All regions of an optimizer; printed, one line for each parameter."""

    def __init__(self, regions: list[Region], kept: dict[int, int] | None = None) -> None:
        self.regions = regions
        self.kept = kept or {}  # bytes of state of each parameter, by index

    def __getitem__(self, index: Any) -> Any:
        return self.regions[index]

    def __len__(self) -> int:
        return len(self.regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

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
        lines = [("parameter", "shape", "blocks", "direction", "state bytes", "refresh n³")]
        total, numel = [0, 0], 0
        for index, group in itertools.groupby(self.regions, key=lambda region: region.index):
            regions = list(group)
            refresh = sum(region.count * region.cost for region in regions)
            bytes_ = self.kept.get(index, 0)
            total, numel = [total[0] + bytes_, total[1] + refresh], numel + sum(r.numel for r in regions)
            blocks = " + ".join(_blocks(region) for region in regions)
            shape = "x".join(map(str, regions[0].shape)) or "scalar"
            lines.append(
                (regions[0].name, shape, blocks, _direction(regions[0]), f"{bytes_:,}", f"{refresh:.2g}")
            )
        per = f"{total[0] / max(numel, 1):.1f} a parameter"
        lines.append((f"{numel:,} parameters", "", "", "", f"{total[0]:,} ({per})", f"{total[1]:.2g}"))
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def _blocks(region: Region) -> str:
    if not region.dims:
        return "entries"
    size = "x".join(map(str, region.dims))
    return f"{region.count} of {size}" if region.count > 1 else size


def _direction(region: Region) -> str:
    if not region.sides or len(region.sides) == len(region.dims):
        return region.direction
    return f"{region.direction} (side {', '.join(str(region.axes[side] + 1) for side in region.sides)})"


def arrange(
    index: int, name: str, shape: Shape, group: int, options: dict[str, Any], *, by_name: bool = False
) -> list[Region]:
    """The regions of one parameter. Raises ValueError for a `split` that does not divide the first dim.

    options: a group's direction, block, merge, split, one_sided_above, full_matrix_up_to. by_name: matrices named
    like embeddings and heads have the shorter side alone, or the diagonal rule where matrices are spectral.
    """
    block, direction, split = options["block"], options["direction"], options["split"]
    if split > 1 and (not shape or shape[0] % split):
        raise ValueError(
            f"split is {split}; it must divide the first dimension of {name}, which has shape {shape}"
        )
    merged = merge(
        shape, block, "matrix" if direction == "spectral" else options["merge"], keep_first=split > 1
    )
    if len(merged) < 2:
        numel = prod(shape)
        if direction in SIDED and 1 < numel <= options["full_matrix_up_to"]:
            return [Region(name, index, group, 0, (numel,), (0,), (0,), (1,), (numel,), (0,), "root")]
        return [_entries(index, name, numel, group)]
    is_table = by_name and len(shape) == 2 and TABLES.search(name) is not None
    if direction == "diagonal" or (direction == "spectral" and is_table):
        return [_entries(index, name, prod(shape), group)]
    whole = merged if direction == "spectral" else None
    # the middle of three dims is the one whose products would need copies: it costs least where it is small
    axes = (0, 2, 1) if len(merged) == 3 and merged[2] < merged[1] else tuple(range(len(merged)))
    shape, merged = merged, tuple(merged[axis] for axis in axes)
    cuts = [_cut(size, size if whole else block, split if dim == 0 else 1) for dim, size in enumerate(merged)]
    part = (merged[0] // split, *merged[1:])
    kept = sides(part, "one_sided" if is_table else direction, options["one_sided_above"])
    return [
        Region(
            name, index, group, number, shape, axes,
            tuple(start for start, _, _ in cut), tuple(count for _, count, _ in cut),
            tuple(size for _, _, size in cut), kept, direction,
        )
        for number, cut in enumerate(itertools.product(*cuts))
    ]  # fmt: skip


def merge(shape: Shape, block: int, how: str, *, keep_first: bool = False) -> Shape:
    """Drop dims of size 1 and merge neighbours, from the last dim while the product is at most block and two are left.

    how: "dims" does that, "matrix" gives (first, rest), "none" merges nothing. keep_first leaves the first dim
    alone, for one that is split by heads.
    """
    left = tuple(size for size in shape if size != 1)
    if how == "none" or len(left) < 2:
        return left
    if how == "matrix":
        return (left[0], prod(left[1:]))
    merged = [left[-1]]
    for position, size in reversed(list(enumerate(left[:-1]))):
        alone = position == 0 and (keep_first or len(merged) == 1)
        if merged[0] * size <= block and not alone:
            merged[0] *= size
        else:
            merged.insert(0, size)
    return tuple(merged)


def sides(shape: Shape, direction: str, one_sided_above: float) -> tuple[int, ...]:
    """Which dims of a parameter of two or more have factors.

    The shorter one alone for one_sided, and for a matrix more than one_sided_above times longer than wide.
    """
    if direction not in SIDED:
        return ()
    if direction == "one_sided" or (len(shape) == 2 and max(shape) > one_sided_above * min(shape)):
        return (shape.index(min(shape)),)
    return tuple(range(len(shape)))


def _entries(index: int, name: str, numel: int, group: int) -> Region:
    return Region(name, index, group, 0, (numel,), (0,), (0,), (numel,), (), (), "diagonal")


def _cut(size: int, block: int, split: int) -> list[tuple[int, int, int]]:
    """(start, count, size of each) of the pieces of one dim: parts of size / split, each cut at the block size."""
    part = size // split
    if split > 1:
        piece = next(piece for piece in range(min(part, block), 0, -1) if part % piece == 0)
        return [(0, size // piece, piece)]
    pieces = [(0, size // block, block)] if size >= block else []
    if size % block:
        pieces.append((size - size % block, 1, size % block))
    return pieces
