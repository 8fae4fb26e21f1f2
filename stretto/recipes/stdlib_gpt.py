"""Recipes for stdlib-gpt. Batch, budget and rates were tuned on seeds that no race uses: see records/."""

from __future__ import annotations

from stretto.core import Recipe
from stretto.methods import (
    AdamW,
    Muon,
    NGramEmbeddings,
    QKNorm,
    RotaryPositions,
    ShortConvolution,
    SquaredReLU,
    ValueEmbeddings,
    WarmupStableDecay,
    ZeroInitResidual,
)


def baseline() -> Recipe:
    """GPT-2 as it is, AdamW, linear warm-up and decay to zero."""
    return Recipe(AdamW(lr=2e-3, weight_decay=0.1), WarmupStableDecay())


def modern() -> Recipe:
    """What a user of today starts from: the same with rotary positions."""
    return baseline() + RotaryPositions()


def fast_without_tables() -> Recipe:
    """The best composition found at the baseline's parameter count."""
    return Recipe(
        Muon(),
        WarmupStableDecay(),
        RotaryPositions(),
        QKNorm(),
        SquaredReLU(),
        ZeroInitResidual(),
        ShortConvolution(),
    )


def fast() -> Recipe:
    """The best composition found; its tables buy speed with memory."""
    return fast_without_tables() + NGramEmbeddings() + ValueEmbeddings()


# target -> name -> (recipe, batch, budget in examples), the reference first
RACES = {
    "baseline": {
        "baseline": (baseline(), 4, 4 * 600),
        "modern": (modern(), 4, 4 * 160),
        "fast": (fast(), 8, 8 * 20),
    },
    "modern": {
        "modern": (modern(), 4, 4 * 600),
        "fast": (fast(), 8, 8 * 40),
    },
}
MORE = {"baseline": {"fast-without-tables": (fast_without_tables(), 4, 4 * 150)}}
