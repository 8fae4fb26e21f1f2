"""Stretto: train neural networks faster by changing the training algorithm.

The public names, each loaded with its file when it is first asked for: the command line must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stretto.core import At, Batch, Mixed, Phase, Recipe
    from stretto.plan import Plan
    from stretto.update import Updater

__version__ = "0.1.0"
__all__ = ["At", "Batch", "Mixed", "Phase", "Plan", "Recipe", "Updater"]

_HOMES = {"Plan": "stretto.plan", "Updater": "stretto.update"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'stretto' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "stretto.core")), name)
