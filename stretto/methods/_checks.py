"""Checks that several methods make of their fields, with one wording."""

from __future__ import annotations

import typing
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


def check_counts(method: Any, *names: str) -> None:
    """Raise ValueError where a named field is below 1."""
    for name in names:
        if getattr(method, name) < 1:
            raise ValueError(
                f"{type(method).__name__}: {name} is {getattr(method, name)}; it must be 1 or more"
            )


def check_choices(method: Any, *names: str) -> None:
    """Raise ValueError where a named field is none of its Literal type."""
    types = typing.get_type_hints(type(method))
    for name in names:
        *others, last = typing.get_args(types[name])
        if getattr(method, name) not in (*others, last):
            listed = f"{', '.join(map(str, others))} or {last}"
            raise ValueError(
                f"{type(method).__name__}: {name} is {getattr(method, name)!r}; it must be {listed}"
            )


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay is meant for it: matrices and kernels, not vectors, norms and biases."""
    return parameter.ndim >= 2
