"""Shampoo on several ranks: bytes on the wire and step time, beside AdamW under the same wrapper and beside the layout.

    python benchmarks/scale.py [--sets gpt2tiny,resnet18] [--ranks 1,2,4] [--quick]   # gloo ranks on this machine
    python benchmarks/scale.py --model                      # the cost model from 124M to 70B on 8 to 4096 GPUs
    python benchmarks/scale.py --write docs/scale.md        # both, into the tables of the page

Each rank is a process of one thread. A step is forward and backward of a model that has nothing but its parameters, so
that the wrapper moves weights and gradients as it would, and the optimizer's step. Bytes are those that the
loopback device sent, all ranks together and headers included: let nothing else use it. CPU milliseconds are of the
rank that has most; ranks that share a core say little by the clock.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from optimizer_shapes import SETS, Shapes, gradient_pool
from scale_model import TABLES, figure, table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stretto.optim import Shampoo

EVERY = 10  # steps of a refresh cycle
WRAPPERS = ("ddp", "fsdp")
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda named, group: torch.optim.AdamW([p for _, p in named], lr=1e-3, foreach=True),
    "Shampoo": lambda named, group: Shampoo(named, lr=1e-3, every=EVERY, process_group=group),
    "Shampoo, bfloat16 travels": lambda named, group: Shampoo(
        named, lr=1e-3, every=EVERY, process_group=group, transport="bfloat16"
    ),
}


class Measured(NamedTuple):
    """Of a step: medians of the wrapper's passes, means over a refresh cycle of the optimizer's step."""

    passes_wire: float  # bytes sent by all ranks
    step_wire: float
    passes_cpu: float  # milliseconds of the rank that has most
    step_cpu: float
    step_wall: float
    foretold_wire: float  # of the step, by the layout
    load: float  # of the rank that has most at each step of a cycle, of all there is


class Bag(nn.Module):
    """Parameters of these shapes; forward returns the sum of their products with given gradients."""

    def __init__(self, shapes: Shapes, gradients: Sequence[Tensor]) -> None:
        super().__init__()
        self.gradients = gradients
        names = [f"embeddings.{n}" for n, _ in enumerate(shapes.tables)]
        names += [f"inner.{n}" for n, _ in enumerate(shapes.others)]
        for name, gradient in zip(names, gradients):
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.randn_like(gradient) * 0.02))

    def forward(self) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.parameters(), self.gradients)]).sum()


def measure(shapes: Shapes, wrapper: str, optimizer: str, cycles: int) -> Measured:
    """On this rank, the figures of all of them."""
    torch.manual_seed(0)
    model: nn.Module = Bag(shapes, gradient_pool(shapes, sets=1)[0])
    group = dist.group.WORLD if wrapper == "ddp" else None
    model = DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model)
    named = [(name.replace("embeddings_", "embeddings."), p) for name, p in model.named_parameters()]
    stepper = OPTIMIZERS[optimizer](named, group)
    passes, steps = [], []
    for step in range(EVERY * (cycles + 1)):
        found = [timed(lambda: model().backward()), timed(stepper.step)]
        model.zero_grad()
        if step >= EVERY:
            passes.append(found[0])
            steps.append(found[1])
    middle = [statistics.median(column) for column in zip(*passes)]
    # a refresh cycle has steps of several kinds; other traffic on the device only adds to the bytes
    wire = min(bytes_ for bytes_, _, _ in steps)
    cpu, wall = (statistics.fmean(column) for column in list(zip(*steps))[1:])
    foretold, load = 0.0, 1.0
    if isinstance(stepper, Shampoo):
        layout = stepper.layout
        most = statistics.fmean(max(layout.loads(step).values()) for step in range(EVERY))
        foretold, load = layout.traffic().total(), most / sum(layout.loads().values())
    return Measured(min(b for b, _, _ in passes), wire, middle[1], cpu, wall, foretold, load)


def timed(function: Callable[[], Any]) -> tuple[float, float, float]:
    """Bytes that all ranks sent, CPU milliseconds of the heaviest rank, wall milliseconds of the slowest."""
    dist.barrier()
    sent, cpu, wall = loopback(), time.process_time(), time.perf_counter()
    function()
    own = torch.tensor([(time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3])
    dist.barrier()
    moved = loopback() - sent
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return float(moved), *own.tolist()


def loopback() -> int:
    """Bytes that the loopback device has sent since it is up."""
    line = next(
        line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")
    )
    return int(line.split()[9])


def on_ranks(ranks: int, *args: Any) -> Measured:
    """measure(*args) on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=_rank, args=(rank, ranks, folder, args)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a rank of {ranks} failed; see what it printed above")
        return Measured(*torch.load(Path(folder, "measured.pt")))


def _rank(rank: int, ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", where, timedelta(minutes=5), ranks, rank)
    found = measure(*args)
    if rank == 0:
        torch.save(tuple(found), Path(folder, "measured.pt"))
    dist.destroy_process_group()


def measured(sets: Sequence[str], counts: Sequence[int], cycles: int) -> str:
    """What this machine's ranks took, beside what the layout foretells."""

    def rows() -> Iterator[Sequence[Any]]:
        for name in sets:
            for wrapper in WRAPPERS:
                taken: dict[tuple[str, int], float] = {}
                for optimizer in OPTIMIZERS:
                    for ranks in counts:
                        found = on_ranks(ranks, SETS[name], wrapper, optimizer, cycles)
                        is_ours = optimizer != "AdamW"
                        taken[optimizer, ranks] = found.step_cpu
                        own = taken[optimizer, counts[0]] - taken["AdamW", counts[0]]
                        yield (
                            name, wrapper, optimizer, ranks, figure(found.passes_wire, 1e6),
                            figure(found.step_wire, 1e6), figure(found.foretold_wire, 1e6) if is_ours else "0",
                            figure(found.passes_cpu), figure(found.step_cpu),
                            figure(taken["AdamW", ranks] + own * found.load) if is_ours else "",
                            figure(found.step_wall),
                        )  # fmt: skip

    head = ("set", "wrapper", "optimizer", "ranks", "MB, passes", "MB, step", "MB, step foretold", "CPU ms, passes",
            "CPU ms, step", "CPU ms, step foretold", "wall ms, step")  # fmt: skip
    return table(head, rows())


def write(page: Path, tables: dict[str, str]) -> None:
    """Put tables between their marks, `<!-- name -->` and `<!-- end -->`."""
    text = page.read_text()
    for name, rows in tables.items():
        text, count = re.subn(
            rf"(?s)(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, rows=rows: f"{found[1]}{rows}\n{found[2]}",
            text,
        )
        if not count:
            raise ValueError(
                f"{page} has no place for the table {name}; it wants <!-- {name} --> and <!-- end -->"
            )
    page.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default=",".join(SETS), help="of parameters, between commas")
    parser.add_argument("--ranks", default="1,2,4", help="between commas")
    parser.add_argument("--quick", action="store_true", help="one refresh cycle")
    parser.add_argument("--model", action="store_true", help="the cost model instead")
    parser.add_argument("--write", type=Path, help="a page, whose tables are replaced")
    options = parser.parse_args(arguments)
    sets = options.sets.split(",")
    if unknown := [name for name in sets if name not in SETS]:
        parser.error(f"unknown: {', '.join(unknown)}; sets are {', '.join(SETS)}")
    tables = {}
    if not options.model:
        counts = [int(count) for count in options.ranks.split(",")]
        tables["measured"] = measured(sets, counts, 1 if options.quick else 2)
    if options.model or options.write:
        tables |= {name: function() for name, function in TABLES.items()}
    for name, rows in tables.items():
        print(f"\n{name}\n{rows}")
    if options.write:
        write(options.write, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
