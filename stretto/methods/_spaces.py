"""Search spaces: which values of its fields a method is tuned over.

A method declares its own as texts, `spaces = {"lr": "log:1e-3..1e-1"}`; the command line has the same texts.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from stretto import methods
from stretto.core import Method, Recipe, nearest
from stretto.methods import _reading

FORMS = "log:0.001..0.1, linear:0.8..0.99 or jordan|polar"


@dataclass(frozen=True)
class Space:
    """What one field may be: a range, even on a linear or a log scale, or some choices."""

    method: type[Method]
    field: str
    scale: Literal["log", "linear", "choice"]
    ends: tuple[Any, ...]  # low and high; or the choices

    @property
    def name(self) -> str:
        """As the command line names it: muon.lr."""
        return f"{self.method.name}.{self.field}"

    @property
    def whole(self) -> bool:
        """Whether its values are integers."""
        return typing.get_type_hints(self.method)[self.field] is int

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1) of the range, to three digits."""
        if self.scale == "choice":
            return self.ends[int(share * len(self.ends))]
        low, high = self.ends
        if self.whole:  # each integer has as much of the range as any other, on its scale
            low, high = low - 0.5, high + 0.5
        value = low * (high / low) ** share if self.scale == "log" else low + (high - low) * share
        return self.near(value)

    def near(self, value: float) -> Any:
        """A value of the field: an integer, or to three digits; never outside the range."""
        low, high = self.ends
        return min(max(round(value) if self.whole else float(f"{value:.3g}"), low), high)

    def __str__(self) -> str:
        if self.scale == "choice":
            return "|".join(map(str, self.ends))
        low, high = self.ends
        return f"{self.scale}:{low:g}..{high:g}"


def parse(text: str) -> Space:
    """A space from "muon.lr=log:0.005..0.08"; from "muon.lr" alone, what the method declares.

    Raises ValueError for unknown methods and fields, with the nearest names, and for a range that is empty.
    """
    name, _, values = (part.strip() for part in text.partition("="))
    method_name, dot, field = name.partition(".")
    if not dot:
        raise ValueError(f"the space {text!r} names no field; it should look like muon.lr=log:0.005..0.08")
    method = methods.find(method_name)
    known = [one.name for one in fields(method)]  # type: ignore[arg-type]
    if field not in known:
        raise ValueError(f"{method.name} has no field {field!r}; {nearest(field, known)}")
    if values:
        return _read(method, field, values)
    if field not in method.spaces:
        raise ValueError(f"{name} declares no range; give one: {name}=log:0.001..0.1")
    return _read(method, field, method.spaces[field])


def choose(recipes: Sequence[Recipe], asked: Sequence[Space]) -> list[tuple[Space, ...]]:
    """For each recipe the spaces of its methods: those asked for, or all that are declared where none is its own.

    Raises ValueError for one that no recipe has a use for, where a recipe is left with none, and for an end that
    its method refuses.
    """
    if unused := next((one for one in asked if not any(one.method in recipe for recipe in recipes)), None):
        held = {method.name for recipe in recipes for method in recipe.methods}
        raise ValueError(
            f"no recipe here has {unused.method.name}, so {unused.name} cannot be tuned; "
            f"{nearest(unused.method.name, held)}"
        )
    return [_choose(recipe, asked) for recipe in recipes]


def _choose(recipe: Recipe, asked: Sequence[Space]) -> tuple[Space, ...]:
    chosen = tuple(space for space in asked if space.method in recipe) or tuple(
        _read(type(method), field, text) for method in recipe.methods for field, text in method.spaces.items()
    )
    if not chosen:
        raise ValueError(
            f"nothing is declared to tune in {recipe}; give --space, such as adamw.lr=log:1e-4..1e-2"
        )
    names = [space.name for space in chosen]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the space of {twice} is given twice")
    for space in chosen:
        for end in space.ends:
            recipe.replace(space.method, **{space.field: end})
    return chosen


def _read(method: type[Method], field: str, text: str) -> Space:
    name = f"{method.name}.{field}"
    found = re.fullmatch(r"(log|linear):(.+?)\.\.(.+)", text)
    if not found and "|" not in text:
        raise ValueError(f"the space of {name} is {text!r}; it should look like {FORMS}")
    texts = found.groups()[1:] if found else text.split("|")
    ends = tuple(
        _reading.read_fields(method, {field: _reading.literal(one.strip())}, methods._nested)[field]
        for one in texts
    )
    if not found:
        return Space(method, field, "choice", ends)
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
        raise ValueError(f"the space of {name} is {text!r}; a range is of numbers")
    low, high = ends
    if low >= high:
        raise ValueError(f"the range {low:g}..{high:g} of {name} is empty; write the smaller end first")
    if found[1] == "log" and low <= 0:
        raise ValueError(f"the log range of {name} begins at {low:g}; begin above 0, or write linear:")
    return Space(method, field, "log" if found[1] == "log" else "linear", ends)
