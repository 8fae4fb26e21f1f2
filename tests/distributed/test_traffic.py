"""What travels is what the layout says: counted where the collectives are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_family import FAMILY, Net, give, gradients, spread

from stretto.optim import exchange

Moved = dict[tuple[str, int], tuple[int, int]]  # of collective and ranks: bytes sent and received


def moved(parallel: str, options: dict[str, Any]) -> tuple[Moved, Moved, int, int]:
    """Of a step on this rank: counted and foretold; and of its state."""
    counted: Moved = {}

    def count(collective: str, ranks: int, sent: int, received: int) -> None:
        before = counted.get((collective, ranks), (0, 0))
        counted[collective, ranks] = (before[0] + sent, before[1] + received)

    def exchanged(into: torch.Tensor, out: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count("all_to_all", kwargs["group"].size(), out.nbytes, into.nbytes)
        return all_to_all(into, out, *args, **kwargs)

    def gathered(into: torch.Tensor, mine: torch.Tensor, group: Any) -> Any:
        others = group.size() - 1
        count("all_gather", group.size(), others * mine.nbytes, into.nbytes - mine.nbytes)
        return all_gather(into, mine, group=group)

    all_to_all, dist.all_to_all_single = dist.all_to_all_single, exchanged
    all_gather, exchange._all_gather = exchange._all_gather, gathered
    model = Net()
    group = spread(model, parallel)
    optimizer = FAMILY["root"](model.named_parameters(), lr=0.01, block=8, process_group=group, **options)
    give(model, gradients(0))
    optimizer.step()
    layout, rank = optimizer.layout, dist.get_rank()
    foretold: Moved = {}
    for _, collective, ranks, sent, received in layout.traffic():
        before = foretold.get((collective, ranks), (0, 0))
        foretold[collective, ranks] = (
            before[0] + sent.get(rank, 0),
            before[1] + received.get(rank, 0),
        )
    return counted, foretold, optimizer.state_bytes(), layout.state_bytes()[rank]


@pytest.mark.parametrize("parallel, ranks", [
    ("ddp", 4), ("small groups", 4), ("fsdp", 4), ("hsdp", 4), ("tp", 2), ("tp+fsdp", 4)
])  # fmt: skip
@pytest.mark.parametrize("transport", [None, "bfloat16"])
def test_what_travels_is_what_the_layout_says(parallel: str, ranks: int, transport: str | None) -> None:
    for counted, foretold, kept, planned in run(moved, ranks, parallel, {"transport": transport}):
        assert counted == foretold
        assert abs(kept - planned) < 2000  # counters of parameters and of blocks that are elsewhere
