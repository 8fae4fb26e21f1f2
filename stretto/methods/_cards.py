"""What the catalogue prints about a method, read from its class and its source."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from typing import Any, NamedTuple

from stretto.core import SLOTS, Method


class Row(NamedTuple):
    """One line of the catalogue."""

    name: str
    places: str  # "optimizer/update factors/group"
    summary: str  # one sentence
    fields: str  # "lr=0.02 momentum=0.95"


def places(method: type[Method]) -> str:
    """Where it runs, as slot/phase."""
    found = []
    for slot_class, slot in SLOTS.items():
        if issubclass(method, slot_class):
            phases: Any = method.phases
            if isinstance(phases, property):  # it takes those of the methods it is made of
                found.append(f"{slot.name}/any")
            else:
                found.extend(f"{slot.name}/{p.name.lower()}" for p in slot.order if p in phases)
    return " ".join(found)


def row(method: type[Method]) -> Row:
    """The method's line in the table."""
    fields = " ".join(
        f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default}".replace(", ", ",")
        for f in dataclasses.fields(method)  # type: ignore[arg-type]
    )
    sentence = " ".join((method.__doc__ or "").split("\n\n")[0].split())
    return Row(method.name, places(method), re.split(r"(?<=\.)\s", sentence)[0], fields)


def card(method: type[Method]) -> str:
    """Title, citation, what it does and costs, where it runs, and its fields with their units."""
    module = inspect.cleandoc(sys.modules[method.__module__].__doc__ or "")
    lines = [f"{method.__name__} ({method.name})", "", module, "", inspect.cleandoc(method.__doc__ or "")]
    lines += ["", f"runs at: {places(method)}"]
    comments = _comments(method)
    for f in dataclasses.fields(method):  # type: ignore[arg-type]
        default = "" if f.default is dataclasses.MISSING else f" = {f.default!r}"
        comment = f"  # {comments[f.name]}" if comments.get(f.name) else ""
        lines.append(f"  {f.name}: {f.type}{default}{comment}")
    return "\n".join(lines)


def _comments(method: type[Method]) -> dict[str, str]:
    """The comments that end the lines where fields are declared."""
    found = re.findall(r"^    (\w+): [^#\n]*(?:#[ ]*(.*))?$", inspect.getsource(method), re.MULTILINE)
    return dict(found)
