"""Recipes for digits."""

from __future__ import annotations

from stretto.core import Recipe
from stretto.methods import AdamW, Muon, WarmupStableDecay


def baseline() -> Recipe:
    """AdamW with linear decay to zero."""
    return Recipe(AdamW(lr=4e-3, weight_decay=0.1), WarmupStableDecay())


def fast() -> Recipe:
    """Muon on the kernels."""
    return Recipe(Muon(), WarmupStableDecay())


RACES = {
    "baseline": {
        "baseline": (baseline(), 64, 64 * 200),
        "fast": (fast(), 64, 64 * 100),
    }
}
