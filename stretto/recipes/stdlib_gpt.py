"""Recipes for stdlib-gpt. Batch, budget and rates were tuned on seeds that no race uses: see records/."""

from __future__ import annotations

from stretto.core import Recipe
from stretto.methods import (
    AdamW,
    Muon,
    NGramEmbeddings,
    RotaryPositions,
    ShortConvolution,
    SquaredReLU,
    ValueEmbeddings,
    WarmupStableDecay,
    ZeroInitResidual,
)


def baseline() -> Recipe:
    """GPT-2 as it is, AdamW, a short warm-up and linear decay to zero."""
    return Recipe(AdamW(lr=1e-3, weight_decay=0.0125), WarmupStableDecay())


def modern() -> Recipe:
    """What a user of today starts from: the same with rotary positions."""
    return baseline().replace(AdamW, weight_decay=0.025) + RotaryPositions()


def fast_without_tables() -> Recipe:
    """The best composition found at the baseline's parameter count."""
    return Recipe(*BODY, ShortConvolution())


def fast() -> Recipe:
    """The best composition found; its tables buy speed with memory."""
    return Recipe(*BODY, NGramEmbeddings(rate=8.0), ValueEmbeddings())


BODY = (
    Muon(lr=0.03, adam_lr=0.016, momentum=0.85),
    WarmupStableDecay(),
    RotaryPositions(),
    SquaredReLU(),
    ZeroInitResidual(),
)

# target -> name -> (recipe, batch, budget in examples), the reference first
RACES = {
    "baseline": {
        "baseline": (baseline(), 2, 2080),
        "modern": (modern(), 4, 1200),
        "fast": (fast(), 8, 88),
    },
    "modern": {
        "modern": (modern(), 4, 2400),
        "fast": (fast(), 8, 208),
    },
}
# named, but not raced unless asked for
MORE = {"baseline": {"fast-without-tables": (fast_without_tables(), 8, 440)}}
