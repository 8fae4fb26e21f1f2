"""Running statistics of batch norm: over the slices of a step, over ranks, and anew for averaged weights.

They are linear in the statistics of each batch. So slices that begin alike, and keep the mean of what they end
with, are the same on one rank as on several, and ranks need to average only what somebody is about to look at.

What is normalised by, in training, are the rows of a slice: ranks are one process with as many slices. Layers that
take the rows of all ranks together, as torch's SyncBatchNorm does on GPUs, are one process with a single slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")


def moving(model: nn.Module) -> list[_BatchNorm]:
    """The layers whose statistics move; frozen ones stand in eval mode within a training model."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
        if module.training or not model.training
    ]


def statistics(norms: list[_BatchNorm]) -> list[Tensor]:
    """Means and variances of these layers."""
    return [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]


def from_one_beginning(slices: list[list[T]], norms: list[_BatchNorm]) -> Iterator[T]:
    """The parts of each slice, all slices beginning with the present statistics; the mean of their ends is kept."""
    moved = statistics(norms)
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    begin = [s.clone() for s in moved + counts]
    sums = [torch.zeros_like(s) for s in moved]
    for number, parts in enumerate(slices):
        if number:
            with torch.no_grad():
                torch._foreach_copy_(moved + counts, begin)
        yield from parts
        torch._foreach_add_(sums, moved)
    with torch.no_grad():
        torch._foreach_div_(sums, len(slices))
        torch._foreach_copy_(moved, sums)


@torch.no_grad()
def merge(norms: list[_BatchNorm], group: dist.ProcessGroup | None, ranks: int) -> None:
    """Give each rank the mean of all ranks' statistics."""
    moved = statistics(norms)
    if group is None or not moved:
        return
    for dtype in sorted({s.dtype for s in moved}, key=str):
        mine = [s for s in moved if s.dtype == dtype]
        joint = torch.cat(mine)
        dist.all_reduce(joint, group=group)
        torch._foreach_copy_(mine, list((joint / ranks).split([len(s) for s in mine])))


def estimate(
    norms: list[_BatchNorm], run: Callable[[T], object], batches: Iterable[T],
    group: dist.ProcessGroup | None,
) -> None:  # fmt: skip
    """Make the statistics of these layers a plain average over the batches of all ranks.

    A momentum of 1 leaves each batch's own in the layer. None would do the averaging, but reads a count
    from the device in each layer, and breaks compiled graphs there. Raises ValueError without batches.
    """
    momenta = [norm.momentum for norm in norms]
    moved = statistics(norms)
    sums = [torch.zeros_like(s) for s in moved]
    count = 0
    try:
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        for batch in batches:
            run(batch)
            torch._foreach_add_(sums, moved)
            count += 1
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            norm.eval()
    if group is not None:
        total = torch.tensor(count).to(moved[0].device)
        dist.all_reduce(total, group=group)
        count = int(total)
    if not count:
        raise ValueError(
            "averaged weights need batch norm re-estimated: update.evaluating(plan.calibration(data))"
        )
    torch._foreach_copy_(moved, sums)
    merge(norms, group, ranks=1)
    torch._foreach_div_(moved, count)
