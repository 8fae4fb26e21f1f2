"""Stochastic depth: each layer is skipped at random, deeper ones more often.

Huang et al. 2016, arXiv:1603.09382.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from stretto.core import At, ModelMethod, Phase, stable_hash
from stretto.methods._rows import Depth, Residual, Sometimes, drop_rows, residuals
from stretto.models.attach import around
from stretto.timed import Timed

Skips = tuple[tuple[bool, ...], ...]


def skip_patterns(rates: Sequence[float], count: int, seed: int) -> Skips:
    """`count` patterns of which layers are skipped, with mean rates as near to the wanted ones as so few allow.

    Over seeds their mean is exact (up to 1 - 1/count: some pattern runs each layer). Each pattern skips as many
    layers, give or take one.
    """
    draw = random.Random(stable_hash(seed, "stochastic_depth"))
    patterns = [[False] * len(rates) for _ in range(count)]
    sum_before, start = 0.0, draw.random()
    for layer, rate in enumerate(rates):
        skips = math.floor(count * (sum_before + rate) + start) - math.floor(count * sum_before + start)
        sum_before += rate
        order = sorted(patterns, key=lambda pattern: (sum(pattern), draw.random()))
        for pattern in order[: min(skips, count - 1)]:
            pattern[layer] = True
    return tuple(map(tuple, patterns))


class Pattern(Timed):
    """Which layers are skipped at this step: one of a few patterns that hold for a run, as plain numbers."""

    def __init__(self, rates: tuple[float, ...], count: int) -> None:
        super().__init__()
        self.rates, self.count = rates, count
        self.number, self.seed = 0, 0
        self.skips = skip_patterns(rates, count, 0)

    def advance(self, at: At, row: int = 0, device: Any = "cpu") -> None:
        """Draw this step's pattern, the same on every rank."""
        if self.seed != at.seed:
            self.seed, self.skips = at.seed, skip_patterns(self.rates, self.count, at.seed)
        self.number = at.shared("stochastic_depth").randrange(self.count)


class SkippedLayer(Sometimes):
    """Runs a block, or gives its input."""

    def __init__(self, pattern: Pattern, place: int, block: Residual) -> None:
        super().__init__(block)
        self.pattern, self.place = pattern, place

    def forward(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (N, ...) to the same shape; with a tuple, its first part."""
        if not self.training:
            return run(x, *args, **kwargs)
        skips = self.pattern.skips
        if skips[self.pattern.number][self.place]:
            return x.clone()  # `fully_shard` makes a view of the input, and wants none for output
        chance = 1 - sum(pattern[self.place] for pattern in skips) / len(skips)
        y, more = self.with_chance(chance, lambda x: run(x, *args, **kwargs), x)
        return (y, *more) if more else y


@dataclass(frozen=True)
class StochasticDepth(ModelMethod):
    """Lets each example pass some residual blocks by, deeper ones more often.

    By sample, a fixed number of each micro-batch's rows runs through a block, and that work alone is done; the
    numbers of a net's blocks add up to the wanted rate, and batch norm sees the rows that run. What a block adds is
    divided by the share of rows that run, so that its mean is that of evaluation, where all run (Huang et
    al. scale at test time instead); blocks that end in a norm, as BERT's, are not scaled. Blocks that change the
    shape always run. By batch, whole layers are skipped, after one of a few patterns that are drawn for the run
    and taken in turn by chance: each is a compiled graph of its own. Uncompiled, there may be many.
    Cost: less than nothing: with linear rates about half of `drop` of the blocks' work; by sample two copies of the
    stream in each block and direction. At least one row runs, so micro-batches of one row lose nothing.
    Evidence: +0.4 % and 1.1x by Composer's card, at 0.1 to 0.2; in MosaicML's hot ResNet-50 recipe (270 epochs) at
    0.1 by sample, not in those of 36 and 135. Made for long training of deep nets.
    Raises ValueError where no block keeps the shape of its input, for fields out of range, in training with a cache
    of keys and values, and by batch under DDP without find_unused_parameters (a skipped layer has no gradients).
    """

    drop: float = 0.1  # rate of the deepest block
    linear: bool = True  # rates rise from 0 with depth; else all alike
    by: Literal["sample", "batch"] = "sample"  # rows pass by, or the layer is skipped for all
    patterns: int = 4  # by batch: sets of skipped layers in a run, each a compiled graph
    phases = (Phase.DEPTH,)
    spaces = {"drop": "linear:0.01..0.3"}

    def __post_init__(self) -> None:
        if not 0 < self.drop < 1 or self.by not in ("sample", "batch") or self.patterns < 2:
            raise ValueError(
                f"StochasticDepth: drop ({self.drop}) lies between 0 and 1, by ({self.by!r}) is sample or batch, "
                f"and patterns ({self.patterns}) are 2 or more"
            )

    @property
    def leaves_unused(self) -> bool:
        """Where layers are skipped as a whole."""
        return self.by == "batch"

    def model(self, model: nn.Module) -> nn.Module:
        """Put the choice of rows, or of layers, around each block."""
        if self.by == "sample":
            return drop_rows("StochasticDepth", model, Depth((self.drop,)), self.linear)
        blocks = residuals("StochasticDepth", model, self.linear)
        rates = tuple(self.drop * (block.end - block.begin) for block in blocks)
        pattern = Pattern(rates, self.patterns)
        for place, block in enumerate(blocks):
            around(block.module, "rows", SkippedLayer(pattern, place, block))
        return model
