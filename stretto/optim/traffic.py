"""What travels between ranks in a step, counted from a layout; nothing is sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from stretto.optim.regions import Region

if TYPE_CHECKING:
    from stretto.optim.layout import Grid, Layout


class Volume(NamedTuple):
    """Bytes that ranks move in a step by one kind of collective."""

    what: str  # "gradients" or "steps"
    collective: str  # "all_to_all" among the ranks of a row, "all_gather" among those of a column
    ranks: int  # that take part in one
    sent: dict[int, int]  # by global rank
    received: dict[int, int]


class Traffic(list[Volume]):
    """All volumes of a step; printed, a line each."""

    def received(self) -> int:
        """Bytes of the rank that receives most."""
        total: dict[int, int] = defaultdict(int)
        for volume in self:
            for rank, count in volume.received.items():
                total[rank] += count
        return max(total.values(), default=0)

    def total(self) -> int:
        """Bytes on the wire, over all ranks."""
        return sum(sum(volume.received.values()) for volume in self)

    def __str__(self) -> str:
        if not self:
            return "nothing travels: each rank steps what it holds"
        lines = [("", "collective", "ranks", "sent: mean", "most", "received: mean", "most")]
        for what, collective, ranks, *moved in self:
            cells = [f"{n:,.0f}" for one in moved for n in (sum(one.values()) / len(one), max(one.values()))]
            lines.append((what, collective, str(ranks), *cells))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*lines)]
        rows = [
            "  ".join([*(c.ljust(w) for c, w in zip(line[:2], widths)),
                       *(c.rjust(w) for c, w in zip(line[2:], widths[2:]))])
            for line in lines
        ]  # fmt: skip
        return "\n".join(["bytes of a rank in a step", *rows])


def count_traffic(layout: Layout, widths: tuple[int, int]) -> Traffic:
    """widths: bytes of an entry of a gradient and of a step on their way."""
    families: dict[Grid, list[Region]] = defaultdict(list)
    for region in layout:
        families[layout.placement(region).grid].append(region)
    moved: dict[tuple[str, str, int], tuple[dict[int, int], dict[int, int]]] = {}
    for grid, regions in families.items():
        for key, sent, received in _family(layout, grid, regions, widths):
            found = moved.setdefault(key, (defaultdict(int), defaultdict(int)))
            for totals, counts in zip(found, (sent, received)):
                for rank, count in zip(grid.ranks, counts.tolist()):
                    totals[rank] += count
    return Traffic(Volume(*key, dict(sent), dict(received)) for key, (sent, received) in moved.items())


def _family(
    layout: Layout, grid: Grid, regions: list[Region], widths: tuple[int, int]
) -> Iterator[tuple[tuple[str, str, int], Tensor, Tensor]]:
    """The collectives of the ranks of a grid: what, how and among how many; bytes sent and received, by number."""
    rows, shards = grid.replicas, grid.shards
    sent, received, found = (torch.zeros(rows * shards, dtype=torch.int64) for _ in range(3))
    pieces: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}  # equal parameters have equal ones
    for region in regions:
        if not region.dims:
            if layout.shared(region):
                found += torch.tensor([layout.entries(region, n)[1] for n in range(rows * shards)])
            continue
        key = (layout.shapes.get(region.index), layout.placement(region).cuts, region.start, region.grid,
               region.dims)  # fmt: skip
        if key not in pieces:
            pieces[key] = _pieces(layout, region, shards)
        shard, block, entries = pieces[key]
        owner = torch.tensor(layout.owners[region.index, region.part])[block]
        sender = owner // shards * shards + shard  # of the owner's row
        found.index_add_(0, sender, entries)
        away = sender != owner
        sent.index_add_(0, sender[away], entries[away])
        received.index_add_(0, owner[away], entries[away])
    gradient, step = widths
    if shards > 1:
        yield ("gradients", "all_to_all", shards), sent * gradient, received * gradient
        yield ("steps", "all_to_all", shards), received * step, sent * step
    if rows > 1:
        largest = found.view(rows, shards).amax(0).repeat(rows)  # to which every message is padded
        yield ("steps", "all_gather", rows), (rows - 1) * largest * step, (rows - 1) * largest * step


def _pieces(layout: Layout, region: Region, shards: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each shard has of each block: shards, blocks and entries, (pieces,) each."""
    found = []
    for shard in range(shards):
        box = layout.box(region, shard)
        for piece in () if box is None else region.pieces(box):
            count = 1
            for size in piece.local[1]:
                count *= size
            found.append((shard, piece.block, count))
    return torch.tensor(found, dtype=torch.int64).view(-1, 3).unbind(1)  # type: ignore[return-value]
