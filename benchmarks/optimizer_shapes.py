"""What the optimizer benchmark steps: shapes of known models, random gradients for them, and the bare products.

No model is built, so none has to be installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Bucket = tuple[Shape, tuple[int, ...], str]  # dims of a block, its preconditioned sides, its direction


class Region(Protocol):
    """What is used of a region of an optimizer's layout."""

    @property
    def dims(self) -> Shape: ...
    @property
    def count(self) -> int: ...
    @property
    def numel(self) -> int: ...
    @property
    def sides(self) -> tuple[int, ...]: ...
    @property
    def direction(self) -> str: ...


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model's parameters."""

    name: str
    tables: tuple[Shape, ...]  # embeddings and positions
    others: tuple[Shape, ...]

    @property
    def numel(self) -> int:
        return sum(prod(shape) for shape in (*self.tables, *self.others))


def gpt(name: str, vocabulary: int, context: int, width: int, layers: int) -> Shapes:
    """GPT-2 with a tied head."""
    matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    norm = [(width,), (width,)]
    layer = [*norm, *norm, *matrices, *((rows,) for rows, _ in matrices)]
    return Shapes(name, ((vocabulary, width), (context, width)), (*layer * layers, *norm))


def resnet18() -> Shapes:
    """ResNet-18 for CIFAR: a 3x3 stem, 10 classes."""
    shapes: list[Shape] = [(64, 3, 3, 3), (64,), (64,)]
    width = 64
    for out in (64, 128, 256, 512):
        for into in (width, out):
            shapes += [(out, into, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            shapes += [(out, into, 1, 1), (out,), (out,)] if into != out else []
        width = out
    return Shapes("resnet18", (), (*shapes, (10, 512), (10,)))


def square_matrices(count: int, size: int = 1024) -> Shapes:
    """Equal matrices."""
    return Shapes(f"{count} of {size}x{size}", (), ((size, size),) * count)


SETS = {"gpt2tiny": gpt("gpt2tiny", 8192, 512, 256, 6), "resnet18": resnet18()}
GPT2 = gpt("gpt2", 50257, 1024, 768, 12)


class Weights:
    """Parameters, and a fixed pool of gradient sets that they take turns with.

    flat: kernels as matrices (out, rest), which torch.optim.Muon wants.
    """

    def __init__(self, shapes: Shapes, pool: Sequence[Sequence[Tensor]], *, flat: bool = False) -> None:
        params = [nn.Parameter(torch.randn_like(g) * 0.02) for g in pool[0]]
        if flat:
            params = [nn.Parameter(p.detach().flatten(1)) if p.ndim > 2 else p for p in params]
        self.tables, self.others = params[: len(shapes.tables)], params[len(shapes.tables) :]
        for p in params:
            p.grad = torch.zeros_like(p)
        self.grads = [p.grad for p in params if p.grad is not None]
        self.pool = [[g.view_as(p) for g, p in zip(gradients, params)] for gradients in pool]
        self.turn = 0

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in (*self.tables, *self.others))

    def next_gradients(self) -> None:
        """Write the next gradient set into the parameters' own."""
        torch._foreach_copy_(self.grads, self.pool[self.turn % len(self.pool)])
        self.turn += 1


def gradient_pool(shapes: Shapes, sets: int = 4, device: str = "cpu") -> list[list[Tensor]]:
    """Sets of normal gradients; each tensor has its own scale, between 1e-3 and 1e-1."""
    generator = torch.Generator(device).manual_seed(0)
    every = (*shapes.tables, *shapes.others)
    scales = (10 ** (-3 + 2 * torch.rand(len(every), generator=generator, device=device))).tolist()
    return [
        [torch.randn(s, generator=generator, device=device) * scale for s, scale in zip(every, scales)]
        for _ in range(sets)
    ]


# -- what any such optimizer has to compute


def buckets(layout: Iterable[Region]) -> Counter[Bucket]:
    """Blocks of equal dims, sides and direction, counted; the diagonal rule's blocks are single entries."""
    found: Counter[Bucket] = Counter()
    for region in layout:
        found[region.dims, region.sides, region.direction] += region.count
    return found


def unfolded(layout: Iterable[Region]) -> list[Shape]:
    """(blocks, d, rest) of each preconditioned side of each bucket."""
    return [
        (count, dims[side], prod(dims) // dims[side])
        for (dims, sides, _), count in buckets(layout).items()
        for side in sides
    ]


class Floor:
    """One product for each statistic and one to apply each root, on contiguous stacks, into memory at hand."""

    def __init__(self, layout: Iterable[Region], dtype: torch.dtype, device: str = "cpu") -> None:
        self.stacks = [
            (
                torch.randn(count, n, rest, device=device).to(dtype),
                torch.zeros(count, n, n, dtype=dtype, device=device),
                torch.empty(count, n, rest, dtype=dtype, device=device),
            )
            for count, n, rest in unfolded(layout)
        ]

    def step(self) -> None:
        """All products of a step."""
        for gradient, statistic, update in self.stacks:  # (B, n, rest), (B, n, n), (B, n, rest)
            statistic.baddbmm_(gradient, gradient.mT, beta=0.99, alpha=0.01)
            torch.bmm(statistic, gradient, out=update)


def flops(layout: Sequence[Region], iterations: int = 5) -> float:
    """Of the products of a plain step: statistics and roots, or the iterations of orthogonal factors."""
    found = sum(4.0 * count * n * n * rest for count, n, rest in unfolded(layout))
    for (dims, _, direction), count in buckets(layout).items():
        if direction == "spectral":
            short, long = sorted((dims[0], prod(dims[1:])))
            found += 2.0 * count * iterations * short**2 * (2 * long + short)
    return found


def factors(layout: Iterable[Region], steps: int = 4) -> list[Tensor]:
    """Statistics of so many random steps, all of one size as one stack (K, n, n)."""
    stacks: dict[int, list[Tensor]] = {}
    for shape in unfolded(layout):
        gradients = [torch.randn(shape) for _ in range(steps)]
        stacks.setdefault(shape[1], []).append(
            sum((g @ g.mT for g in gradients[1:]), gradients[0] @ gradients[0].mT)
        )
    return [torch.cat(found) for found in stacks.values()]
