"""What Shampoo costs on many GPUs, from layouts alone: FLOPs, bytes on the wire, bytes of state, share of a step.

No rank is started and no weight is made. The assumptions about the machine are the fields of `Machine`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from stretto.optim import Shampoo
from stretto.optim.layout import Layout

Shape = tuple[int, ...]
NEWTON = (
    112  # n³ FLOPs of a root by Newton's iteration: torch's counter on factors of 8 normal gradients, any n
)
EVERY = (1, 2, 5, 10, 20, 50, 100, 200)
BOUND = 0.05  # of a training step
RANKS = (8, 64, 512, 4096)
GIGA = 1e9


@dataclass(frozen=True)
class Machine:
    """An 80 GB H100 SXM by its data sheet, and what share of that programs get."""

    bfloat16: float = 989e12  # FLOP/s
    tf32: float = 495e12
    float32: float = 67e12
    products: float = 0.5  # of those rates that batched products get
    training: float = 0.4  # of bfloat16 that forward and backward passes get
    memory: float = 3.35e12 * 0.8  # bytes/s
    inside: float = 450e9 * 0.7  # bytes/s between the GPUs of a machine, each way
    outside: float = 50e9 * 0.7  # between machines, of each GPU
    node: int = 8  # GPUs in a machine
    tokens: int = 8192  # of each GPU in a step

    def wire(self, ranks: int) -> float:
        """Bytes/s that a rank receives when all of so many talk to all."""
        return self.inside if ranks <= self.node else self.outside


H100 = Machine()


class Precision(NamedTuple):
    """Of products, of roots when they are found, of factors and roots as they are kept, and of what travels."""

    name: str
    products: str
    roots: str
    storage: str | None = None
    transport: str | None = None


FULL = Precision("float32", "float32", "float32")
TF32 = Precision("tf32", "tf32", "tf32")
HALF = Precision("bfloat16", "bfloat16", "tf32", "bfloat16", "bfloat16")
PRECISIONS = (FULL, TF32, HALF)


# -- models


def gpt2(width: int, layers: int) -> dict[str, Shape]:
    """GPT-2 with a tied head."""
    shapes: dict[str, Shape] = {"wte": (50257, width), "wpe": (1024, width)}
    for n in range(layers):
        shapes |= {
            f"h.{n}.qkv": (3 * width, width), f"h.{n}.proj": (width, width), f"h.{n}.fc": (4 * width, width),
            f"h.{n}.out": (width, 4 * width), f"h.{n}.norm1": (width,), f"h.{n}.norm2": (width,),
        }  # fmt: skip
    return shapes


def llama(width: int, layers: int, inner: int, grouped: int, vocabulary: int = 32000) -> dict[str, Shape]:
    """Llama 2; grouped: rows of the keys and of the values."""
    shapes: dict[str, Shape] = {"embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width)}
    for n in range(layers):
        shapes |= {
            f"layers.{n}.q": (width, width), f"layers.{n}.k": (grouped, width), f"layers.{n}.v": (grouped, width),
            f"layers.{n}.o": (width, width), f"layers.{n}.gate": (inner, width), f"layers.{n}.up": (inner, width),
            f"layers.{n}.down": (width, inner), f"layers.{n}.norm": (width,),
        }  # fmt: skip
    return shapes


MODELS = {
    "GPT-2 124M": gpt2(768, 12),
    "GPT-2 1.5B": gpt2(1600, 48),
    "Llama 7B": llama(4096, 32, 11008, 4096),
    "Llama 70B": llama(8192, 80, 28672, 1024),
}


def numel(model: str) -> int:
    """Parameters."""
    return sum(math.prod(shape) for shape in MODELS[model].values())


@cache
def layout(model: str, block: int = 1024, storage: str | None = None) -> Layout:
    """Of Shampoo by its own options, on one rank."""
    params = [(name, torch.empty(shape, device="meta")) for name, shape in MODELS[model].items()]
    return Shampoo(params, lr=1e-3, block=block, storage=storage).layout


@cache
def spread(model: str, ranks: int, block: int = 1024, storage: str | None = None) -> Layout:
    """Over so many shards, as fully_shard cuts."""
    return layout(model, block, storage).on(shards=ranks)


# -- of one rank and step


class Cost(NamedTuple):
    """Of the rank that has most of it."""

    products: float  # FLOPs of statistics and steps
    roots: float  # FLOPs of all roots once
    touched: float  # bytes of memory
    traffic: float  # entries received
    state: int  # bytes


@cache
def cost(model: str, ranks: int, block: int = 1024, storage: str | None = None) -> Cost:
    """What Shampoo costs the heaviest rank."""
    where = spread(model, ranks, block, storage)
    products, roots = torch.zeros(ranks, dtype=torch.float64), torch.zeros(ranks, dtype=torch.float64)
    for region in where:
        if region.dims:
            owned = torch.bincount(torch.tensor(where.owners[region.index, region.part]), minlength=ranks)
            products += owned * (
                4.0 * math.prod(region.dims) * sum(region.dims[side] for side in region.sides)
            )
            roots += owned * float(NEWTON * region.cost)
    state = max(where.state_bytes().values())
    # factors are read and written by the statistics, roots read by the step; weights and gradients pass twice
    touched = 2.0 * state + 16.0 * numel(model) / ranks
    return Cost(float(products.max()), float(roots.max()), touched, where.traffic().received() / 4, state)


class Seconds(NamedTuple):
    """Of a step on the heaviest rank."""

    products: float
    roots: float
    memory: float
    wire: float

    @property
    def total(self) -> float:
        """Nothing is taken to overlap."""
        return sum(self)


def shampoo_seconds(
    model: str, ranks: int, every: int, block: int, precision: Precision, machine: Machine = H100
) -> Seconds:
    """What Shampoo adds to a training step."""
    found = cost(model, ranks, block, precision.storage)
    rates = {name: machine.products * getattr(machine, name) for name in ("bfloat16", "tf32", "float32")}
    width = 2 if precision.transport else 4
    return Seconds(
        found.products / rates[precision.products],
        found.roots / every / rates[precision.roots],
        found.touched / machine.memory,
        found.traffic * width / machine.wire(ranks),
    )


def adamw_seconds(model: str, ranks: int, machine: Machine = H100) -> float:
    """Of AdamW on a shard: 16 bytes read and 12 written for each parameter."""
    return 28.0 * numel(model) / ranks / machine.memory


def training_seconds(model: str, machine: Machine = H100) -> float:
    """Of forward and backward passes, 6 FLOPs for each parameter and token."""
    return 6.0 * numel(model) * machine.tokens / (machine.bfloat16 * machine.training)


def share(model: str, ranks: int, every: int, block: int, precision: Precision) -> float:
    """Of a step that Shampoo takes."""
    added = shampoo_seconds(model, ranks, every, block, precision).total
    return added / (added + training_seconds(model))


def cheapest(model: str, ranks: int, block: int, precision: Precision) -> int | None:
    """The most frequent refresh that keeps Shampoo under the bound; None where none does."""
    return next((every for every in EVERY if share(model, ranks, every, block, precision) < BOUND), None)


# -- tables


def table(head: Sequence[str], rows: Iterator[Sequence[Any]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figure(value: float, unit: float = 1.0) -> str:
    """Three digits."""
    value /= unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def costs() -> str:
    """FLOPs, bytes on the wire and bytes of state of the heaviest rank, beside AdamW's under fully_shard."""

    def rows() -> Iterator[Sequence[Any]]:
        for model in MODELS:
            for ranks in RANKS:
                found, loads = cost(model, ranks), spread(model, ranks).loads()
                mean = sum(loads.values()) / ranks
                own = (
                    2 * 4 * numel(model) * (ranks - 1) / ranks
                )  # parameters in bfloat16 twice, gradients in float32
                yield (
                    model, f"{ranks:,}", f"{max(loads.values()) / mean:.2f}", figure(found.products, GIGA),
                    figure(found.roots, GIGA), figure(4 * found.traffic, 1e6), figure(own, 1e6),
                    figure(found.state, 1e6), figure(8 * numel(model) / ranks, 1e6),
                )  # fmt: skip

    head = ("model", "ranks", "heaviest over mean", "GFLOP, products", "GFLOP, all roots once", "MB received",
            "MB received, fully_shard's own", "MB of state", "MB of state, AdamW")  # fmt: skip
    return table(head, rows())


def memory() -> str:
    """State of the heaviest rank, as ranks grow."""
    counts = (1, 2, 4, 8, 64, 512)

    def rows() -> Iterator[Sequence[Any]]:
        for model in ("GPT-2 124M", "Llama 7B"):
            for name, on in (("fully_shard", "shards"), ("DDP", "replicas")):
                whole = layout(model)
                most = [max(whole.on(**{on: ranks}).state_bytes().values()) for ranks in counts]
                cells = (f"{figure(n, 1e6)} ({n * r / most[0]:.2f})" for n, r in zip(most, counts))
                yield (model, name, *cells)

    return table(("model", "under", *(f"{n} rank{'s' * (n > 1)}" for n in counts)), rows())


def shares() -> str:
    """What share of a training step Shampoo takes, and of what it is made."""
    settings = [(10, FULL), (10, TF32), (50, HALF)]

    def rows() -> Iterator[Sequence[Any]]:
        for model in MODELS:
            for ranks in RANKS:
                parts = shampoo_seconds(model, ranks, *(50, 1024, HALF))
                adamw = adamw_seconds(model, ranks)
                yield (
                    model, f"{ranks:,}", figure(1e3 * training_seconds(model)),
                    f"{adamw / (adamw + training_seconds(model)):.1%}",
                    *(f"{share(model, ranks, every, 1024, precision):.1%}" for every, precision in settings),
                    " + ".join(figure(1e3 * part) for part in parts),
                )  # fmt: skip

    names = (f"every {every}, {precision.name}" for every, precision in settings)
    head = (
        "model",
        "ranks",
        "ms of training",
        "AdamW",
        *names,
        "ms of the last: products + roots + memory + wire",
    )
    return table(head, rows())


def choices() -> str:
    """The most frequent refresh that keeps Shampoo under the bound, by block and precision."""
    blocks = (512, 1024, 2048)

    def rows() -> Iterator[Sequence[Any]]:
        for model in MODELS:
            for ranks in RANKS:
                found = (cheapest(model, ranks, block, p) for p in PRECISIONS for block in blocks)
                yield (model, f"{ranks:,}", *("none" if every is None else every for every in found))

    head = ("model", "ranks", *(f"{p.name}, {block}" for p in PRECISIONS for block in blocks))
    return table(head, rows())


TABLES = {"costs": costs, "memory": memory, "shares": shares, "choices": choices}
