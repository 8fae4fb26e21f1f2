"""One parameter as grids of equal blocks, and which sides of a block are preconditioned; pure data."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

SIDED = ("root", "eigen", "soap", "kl", "one_sided")  # directions with a factor for each preconditioned side
DIRECTIONS = (*SIDED, "spectral", "diagonal")
TABLES = re.compile(
    r"(^|[._])(emb|embeds?|embeddings?|wte|wpe|lm_head|head)([._]|$)"
)  # names of embeddings and heads
EIGH = 13  # operations of a refresh, for each n³ of a side: eigh of 1024 takes 6.3 times one of its products
Shape = tuple[int, ...]
Box = tuple[Shape, Shape]  # where it starts and its size, for each dim


class Piece(NamedTuple):
    """What a block and a shard have in common."""

    block: int
    inside: Box  # of the block, its dims in their kept order
    local: Box  # of the shard, in the same order


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

    def work(self, every: float, iterations: int = 5) -> float:
        """Operations of one block in a step: statistics, direction and, every so many steps, a refresh."""
        numel = prod(self.dims)
        if self.direction == "spectral":
            small = min(self.dims)
            return iterations * (4.0 * small * numel + 2.0 * small**3)
        return sum(4.0 * numel * self.dims[side] for side in self.sides) + EIGH * self.cost / every

    def within(self, shape: Shape, box: Box) -> Box | None:
        """A box of a parameter of this shape as a box of its merged dims, in kept order; None where it is empty.

        Raises ValueError where a dim is cut that was merged with one before it.
        """
        if 0 in box[1]:
            return None
        starts, sizes, dims = [], [], iter(zip(shape, *box))
        for merged in self.shape:
            start, size, whole = 0, 1, 1
            while whole < merged:
                n, first, count = next(dims)
                if n == 1:
                    continue
                if count < n and size > 1:
                    raise ValueError(
                        f"{self.name} of shape {shape} is sharded along a dimension that Shampoo merges with the one "
                        "before it; give its group merge='none'"
                    )
                start, size, whole = start * n + first, (size - 1) * n + count, whole * n
            starts.append(start)
            sizes.append(size)
        return tuple(starts[axis] for axis in self.axes), tuple(sizes[axis] for axis in self.axes)

    def pieces(self, box: Box) -> Iterator[Piece]:
        """What a box of the merged dims, in kept order, has of each block, in the order of blocks."""
        ranges = []
        for start, count, size, first, length in zip(self.start, self.grid, self.dims, *box):
            overlaps = []
            for number in range(max((first - start) // size, 0), count):
                begin = start + number * size
                low, high = max(first, begin), min(first + length, begin + size)
                if low >= high:
                    break
                overlaps.append((number, low - begin, low - first, high - low))
            ranges.append(overlaps)
        for found in itertools.product(*ranges):
            block = 0
            for (number, *_), count in zip(found, self.grid):
                block = block * count + number
            sizes = tuple(size for *_, size in found)
            yield Piece(
                block, (tuple(one[1] for one in found), sizes), (tuple(one[2] for one in found), sizes)
            )

    def box(self, block: int) -> Box:
        """Where a block lies among the merged dims, in kept order."""
        numbers: list[int] = []
        for count in reversed(self.grid):
            block, number = divmod(block, count)
            numbers.insert(0, number)
        return tuple(s + n * d for s, n, d in zip(self.start, numbers, self.dims)), self.dims

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
    if len(merged) < 2 or 0 in merged:
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
