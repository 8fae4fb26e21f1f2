"""Checks that several methods make of their fields, with one wording."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_rates(method: Any, *names: str, betas: tuple[float, ...] = ()) -> None:
    """Raise ValueError where a named field is negative, or a beta outside [0, 1)."""
    for name in names:
        if getattr(method, name) < 0:
            raise ValueError(
                f"{type(method).__name__}: {name} is {getattr(method, name)}; it cannot be negative"
            )
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"{type(method).__name__}: a beta is {beta}; it must lie in [0, 1)")


def check_share(method: Any, *names: str) -> None:
    """Raise ValueError where a named field lies outside [0, 1]."""
    for name in names:
        if not 0 <= getattr(method, name) <= 1:
            raise ValueError(
                f"{type(method).__name__}: {name} is {getattr(method, name)}; it must lie in [0, 1]"
            )


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay is meant for it: matrices and kernels, not vectors, norms and biases."""
    return parameter.ndim >= 2
