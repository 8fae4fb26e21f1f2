"""Random token dropping (random-LTD): middle layers compute a random part of each sequence.

Yao et al. 2022, arXiv:2211.11586.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stretto.core import At, Duration, ModelMethod, Phase, parse_duration
from stretto.methods._rows import divide, each_tensor, join, run_at
from stretto.methods._tokens import (
    around_tokens,
    in_line,
    kept_tokens,
    order_tokens,
    take_pairs,
    take_tokens,
)
from stretto.models.attach import Places, places
from stretto.models.roles import nothing_found, roles
from stretto.timed import Clock

STAGES = 4  # shares of the tokens in a run: each is a graph of its own


class GrowingShare(Clock):
    """The clock of a net's middle layers, with the share of tokens they compute: full from `over` on."""

    def __init__(self, start: float, over: Duration) -> None:
        super().__init__()
        self.over = over
        self.shares = tuple(start + (1 - start) * stage / (STAGES - 1) for stage in range(STAGES))
        self.stage = 0

    def advance(self, at: At, row: int = 0, device: torch.device | str = "cpu") -> None:
        """Set the time and the stage."""
        super().advance(at, row, device)
        over = at.share(self.over)
        self.stage = STAGES - 1 if at.fraction >= over else int(at.fraction / over * (STAGES - 1))


class SomeTokens(nn.Module):
    """Runs a block on some tokens of each row: the others are its output as they are."""

    def __init__(
        self, clock: GrowingShare, block: nn.Module, number: int, prefix: int, where: tuple[Places, ...]
    ) -> None:
        super().__init__()
        self.clock, self.prefix, self.name = clock, prefix, f"tokens {number}"
        self._block, self._where = (block,), where  # in tuples: they are no part of this layer

    def forward(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (N, T, D) to the same shape; with a tuple, its first part."""
        n, total, width = x.shape
        keep = kept_tokens(total, self.clock.shares[self.clock.stage], self.prefix)
        if keep >= total or not self.training:
            return run(x, *args, **kwargs)
        chosen, others = order_tokens(self.clock.uniform(self.name, n, total), keep, self.prefix)

        def cut(tensor: Tensor) -> Tensor:
            if tensor.ndim == 4 and tensor.shape[-2:] == (total, total):  # which attend to which
                return take_pairs(tensor, chosen)
            by_token = tensor.ndim > 1 and tensor.shape[0] in (1, n) and tensor.shape[1] == total
            return take_tokens(tensor, chosen) if by_token else tensor

        def move(noted: Tensor) -> Tensor:
            return take_tokens(noted if noted.ndim == 2 else noted[None], chosen)

        args, kwargs = each_tensor(cut, args), each_tensor(cut, kwargs)
        rows, rest = in_line(chosen, total), in_line(others, total)
        mine, passing = divide(x.flatten(0, 1), rows, rest)
        mine = mine.view(n, keep, width)
        out = run_at(self._where, move, self._block[0], lambda x: run(x, *args, **kwargs), mine)
        y, *more = out if isinstance(out, tuple) else (out,)
        y = join(y.to(x.dtype).flatten(0, 1), passing, rows, rest)
        y = torch.ops.aten._unsafe_view(y, x.shape)  # no view in autograd's books: see _rows._join
        return (y, *more) if more else y


@dataclass(frozen=True)
class RandomTokenDropping(ModelMethod):
    """Lets all layers but the first and the last compute a random part of each row's tokens; the others pass by.

    Each layer and row has its own tokens, in order, with their true positions; a layer's tokens attend to each
    other alone. The part grows over the run to all of them, in at most four sizes. Labels, first and
    last layers and evaluation see every token; a prefix as ViT's class token is always kept.
    Cost: less than nothing: middle layers' work falls with the part, attention's with its square; two copies of the
    stream in each block and direction, and masks are gathered where there are any.
    Evidence: 25.6 % less time and 33.3 % less compute at similar zero-shot results on GPT-3 1.3B; also on
    BERT, and on ViT in fine-tuning (Yao et al., with learning rates scheduled by consumed tokens).
    Raises ValueError where there are no three transformer blocks, for fields out of range, in training with a cache
    of keys and values, and where another method chooses a block's tokens.
    """

    start: float = 0.25  # first share of the tokens
    over: Duration = 0.7  # share of the run until all of them
    phases = (Phase.INSERT,)

    def __post_init__(self) -> None:
        parse_duration(self.over)
        if not 0 < self.start < 1:
            raise ValueError(f"RandomTokenDropping: start is {self.start}; it must lie between 0 and 1")

    def model(self, model: nn.Module) -> nn.Module:
        """Put the choice of tokens around each middle block."""
        parts = roles(model)
        middle = () if parts.is_convolutional else parts.blocks[1:-1]
        if not middle:
            raise nothing_found("RandomTokenDropping", "three or more transformer blocks", model)
        clock, where = GrowingShare(self.start, self.over), tuple(places(model))
        for number, block in enumerate(middle, 2):
            around_tokens("RandomTokenDropping", block, SomeTokens(clock, block, number, parts.prefix, where))
        return model
