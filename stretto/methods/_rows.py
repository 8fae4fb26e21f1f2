"""Rows of a batch that pass a block by: the mechanism of stochastic depth and of progressive layer drop.

A fixed number of rows runs through each block, so that shapes are static and the work is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stretto.models.attach import Places, around, places
from stretto.models.roles import nothing_found, roles
from stretto.timed import Clock

Scaled = Literal["block", "branch", "nothing"]  # where a block that runs with probability p is divided by p
POST_NORM = {"BERT"}  # families whose blocks end in a norm


# -- rows


def dropped_rows(rows: int, begin: float, end: float) -> int:
    """How many of `rows` pass a block by, whose rate is end - begin; at least one runs through it.

    begin and end are sums of the rates of all blocks before it, and up to it: so the roundings of a net even
    out over its depth, and a few rows pass by in some blocks where each rate alone would round to none.
    """
    return max(0, min(math.floor(rows * end + 0.5) - math.floor(rows * begin + 0.5), rows - 1))


def divide(x: Tensor, rows: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, ...) -> its rows (K,), and the rest (N - K,), in x's memory format."""
    return _Divide.apply(x, rows, rest)


def join(kept: Tensor, passing: Tensor, rows: Tensor, rest: Tensor) -> Tensor:
    """What `divide` took apart: (K, ...) and (N - K, ...) -> (N, ...)."""
    return _Join.apply(kept, passing, rows, rest)


class _Divide(torch.autograd.Function):
    """One pass over x each way, where indexing alone would make four of the backward one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, rest)
        return _divide(x, rows, rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _join(*gradients, *ctx.saved_tensors), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: Tensor, passing: Tensor, rows: Tensor, rest: Tensor) -> Tensor:
        ctx.save_for_backward(rows, rest)
        return _join(kept, passing, rows, rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_divide(*gradients, *ctx.saved_tensors), None, None


def _divide(x: Tensor, rows: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    order, back = _orders(x)
    x = x.permute(order)
    return x.index_select(0, rows).permute(back), x.index_select(0, rest).permute(back)


def _join(kept: Tensor, passing: Tensor, rows: Tensor, rest: Tensor) -> Tensor:
    order, _ = _orders(kept)
    layout = torch.contiguous_format if order == sorted(order) else torch.channels_last
    shape = len(rows) + len(rest), *kept.shape[1:]
    x = torch.empty(shape, dtype=kept.dtype, device=kept.device, memory_format=layout)
    x.permute(order).index_copy_(0, rows, kept.permute(order)).index_copy_(0, rest, passing.permute(order))
    return x  # no view, since a hook that `fully_shard` puts on a block's output is lost where one is changed in place


def _orders(x: Tensor) -> tuple[list[int], list[int]]:
    """Dimensions as they lie in memory, and back."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return [0, 2, 3, 1], [0, 3, 1, 2]
    return [*range(x.ndim)], [*range(x.ndim)]


# -- what else a block is given


def each_tensor(change: Callable[[Tensor], Tensor], given: Any) -> Any:
    """Change each tensor in a block's arguments. Raises ValueError for what cannot be cut, as a cache."""
    if isinstance(given, Tensor):
        return change(given)
    if given is None or isinstance(given, bool | int | float | str):
        return given
    if isinstance(given, tuple | list):
        parts = [each_tensor(change, part) for part in given]
        return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)
    if isinstance(given, dict):
        return {key: each_tensor(change, part) for key, part in given.items()}
    raise ValueError(
        f"a block is to compute a part of its rows or tokens, and cannot with a {type(given).__name__} for all "
        "of them; train with use_cache=False, and with attention kernels that take tensors as masks"
    )


def run_at(
    where: tuple[Places, ...],
    change: Callable[[Tensor], Tensor],
    block: nn.Module,
    run: Callable[[Tensor], Any],
    x: Tensor,
) -> Any:
    """Run a block on x with the noted places of tokens changed, and back."""
    noted = [(place, place.current, change(place.current)) for place in where]
    moved = [(place, before, after) for place, before, after in noted if after is not before]

    def there(x: Tensor) -> Any:
        for place, _, after in moved:
            place.move(after)
        try:
            return run(x)
        finally:
            for place, before, _ in moved:
                place.move(before)

    return as_a_whole(block, there, x)


def as_a_whole(block: Any, run: Callable[[Tensor], Any], x: Tensor) -> Any:
    """run(x), which runs the block; where that checkpoints itself, as Hugging Face's do, all of `run` instead.

    What `run` prepares is then there too when the backward pass runs it again.
    """
    if not (getattr(block, "gradient_checkpointing", False) and block.training):
        return run(x)

    def again(x: Tensor) -> Any:
        block.gradient_checkpointing = False
        try:
            return run(x)
        finally:
            block.gradient_checkpointing = True

    return block._gradient_checkpointing_func(again, x)


# -- layers


class Residual(NamedTuple):
    """A block that maps its input to the same shape, and the place of its drop rate among all."""

    module: nn.Module
    number: int
    begin: float  # the sum of the shares of a net's drop rate of the blocks before
    end: float  # and with its own
    scaled: Scaled
    branch: nn.Module | None = None  # the last layer of its branch


class Sometimes(nn.Module):
    """Around a residual block that is not always run: what it adds is divided by how often it does.

    So the mean over draws is the plain block: x + (y - x) / p. Where a ReLU follows the addition, the branch is
    divided before it. A norm at the end leaves nothing to divide.
    """

    def __init__(self, block: Residual) -> None:
        super().__init__()
        self.scaled, self.factor = block.scaled, 1.0
        if block.branch is not None and block.scaled == "branch":
            block.branch.register_forward_hook(self._scale)

    def _scale(self, branch: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self.factor == 1.0 else output * self.factor

    def with_chance(self, chance: float, run: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Any]:
        """The block's stream and whatever else it gives, where it runs with this probability."""
        self.factor = 1 / chance
        try:
            out = run(x)
        finally:
            self.factor = 1.0
        y, *rest = out if isinstance(out, tuple) else (out,)
        y = y.to(x.dtype)
        return torch.lerp(x, y, 1 / chance) if self.scaled == "block" and chance < 1 else y, rest


class Depth(Clock):
    """The clock of one net's blocks, with the drop rate of the last one: one of a few plain numbers."""

    def __init__(self, drops: tuple[float, ...]) -> None:
        super().__init__()
        self.drops, self.stage = drops, 0

    @property
    def drop(self) -> float:
        """The present rate."""
        return self.drops[self.stage]


class SomeRows(Sometimes):
    """Runs a block on some rows of its input: the others are its output as they are."""

    def __init__(self, depth: Depth, block: Residual, where: tuple[Places, ...]) -> None:
        super().__init__(block)
        self.depth, self.begin, self.end = depth, block.begin, block.end
        self.name = f"depth {block.number}"
        self._block, self._where = (block.module,), where  # in tuples: they are no part of this layer

    def forward(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (N, ...) to the same shape; with a tuple, its first part."""
        n, drop = x.shape[0], self.depth.drop
        dropped = dropped_rows(n, drop * self.begin, drop * self.end) if self.training else 0
        if not dropped:
            return run(x, *args, **kwargs)
        kept = n - dropped
        order = self.depth.uniform(self.name, n)[:, 0].argsort()
        rows, rest = order[:kept], order[kept:]

        def cut(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, rows) if tensor.ndim > 1 and tensor.shape[0] == n else tensor

        args, kwargs = each_tensor(cut, args), each_tensor(cut, kwargs)

        def block(x: Tensor) -> Any:
            return run_at(self._where, cut, self._block[0], lambda x: run(x, *args, **kwargs), x)

        mine, passing = divide(x, rows, rest)
        y, more = self.with_chance(kept / n, block, mine)
        y = join(y, passing, rows, rest)
        return (y, *more) if more else y


def residuals(method: str, model: nn.Module, linear: bool) -> list[Residual]:
    """The blocks that rows may pass by; a block's share is its place in the net where linear, else 1.

    Raises ValueError where there are none.
    """
    parts = roles(model)
    found: list[Residual] = []
    begin = 0.0
    for number, block in enumerate(parts.blocks, 1):
        if not parts.is_convolutional or _keeps_shape(block):
            end = begin + (number / len(parts.blocks) if linear else 1.0)
            if parts.is_convolutional:  # one branch a block
                found.append(Residual(block, number, begin, end, "branch", parts.residual_ends[number - 1]))
            else:
                scaled: Scaled = "nothing" if parts.family in POST_NORM else "block"
                found.append(Residual(block, number, begin, end, scaled))
            begin = end
    if not found:
        raise nothing_found(method, "residual blocks that keep the shape of their input", model)
    return found


def drop_rows(method: str, model: nn.Module, depth: Depth, linear: bool) -> nn.Module:
    """Let rows pass by each residual block of a model."""
    where = tuple(places(model))
    for block in residuals(method, model, linear):
        around(block.module, "rows", SomeRows(depth, block, where))
    return model


def _keeps_shape(block: Any) -> bool:
    """Whether a convolutional block's shortcut is its input itself."""
    shortcut = block.downsample if hasattr(block, "downsample") else block.shortcut
    return shortcut is None or isinstance(shortcut, nn.Identity)
