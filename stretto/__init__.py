"""Stretto: train neural networks faster by changing the training algorithm."""

from stretto.core import At, Batch, Mixed, Phase, Recipe
from stretto.plan import Plan
from stretto.update import Updater

__version__ = "0.1.0"
__all__ = ["At", "Batch", "Mixed", "Phase", "Plan", "Recipe", "Updater"]
