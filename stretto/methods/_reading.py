"""Reading field values: from the text of a short form, or from JSON, into the types that fields declare."""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

from stretto.core import Duration, Method

Nested = Callable[[Any], Method]  # how a field that is itself a method is read


def split(text: str, separator: str) -> list[str]:
    """The stripped pieces between separators outside brackets. Raises ValueError for loose brackets."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            break
        if letter == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth:
        raise ValueError(f"the brackets of {text!r} do not match")
    return [piece.strip() for piece in pieces]


def literal(text: str) -> Any:
    """A Python literal where the text is one, else the text; "500steps" regains its space."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return re.sub(r"^([0-9.]+(?:[eE][+-]?\d+)?)\s*([a-z]+)$", r"\1 \2", text)


def unwrap_brackets(text: str) -> str:
    """The text without one pair of brackets that encloses it whole."""
    enclosed = text.startswith("(") and text.endswith(")")
    return text[1:-1].strip() if enclosed else text


def read_fields(method: type[Method], values: dict[str, Any], nested: Nested) -> dict[str, Any]:
    """Values converted to the declared types; unknown names are left for `core.change` to refuse.

    Raises ValueError naming field, value and the type that was expected.
    """
    types_of = typing.get_type_hints(method)
    known = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    read = {}
    for name, value in values.items():
        if name in known:
            try:
                value = convert(value, types_of[name], nested)
            except TypeError:
                wanted = type_text(types_of[name])
                raise ValueError(f"{method.name}: {name} is {value!r}; it takes {wanted}") from None
        read[name] = value
    return read


def convert(value: Any, wanted: Any, nested: Nested) -> Any:
    """The value as the wanted type; TypeError where it is none. Integers are floats, floats no integers."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return convert(value, choice, nested)
            except TypeError:
                pass
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, tuple | list):
            each = arguments[:1] * len(value) if arguments[-1] is ... else arguments
            if len(each) == len(value):
                return tuple(convert(v, w, nested) for v, w in zip(value, each))
    elif isinstance(wanted, type) and issubclass(wanted, Method):
        if isinstance(value, str | dict):
            return nested(value)
    elif wanted is bool:
        words = {"true": True, "false": False}
        value = words.get(value.lower(), value) if isinstance(value, str) else value
        if isinstance(value, bool):
            return value
    elif wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif wanted in (int, str, types.NoneType) and type(value) is wanted:
        return value
    raise TypeError


def type_text(wanted: Any) -> str:
    """A type as a message names it."""
    if wanted == Duration:
        return "a duration: a share of the run such as 0.3, or a number with a unit such as '500 steps'"
    return wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")
