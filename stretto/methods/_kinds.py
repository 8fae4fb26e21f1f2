"""Groups of parameters cut by kind, so that each kind steps by its own rule."""

from __future__ import annotations

from typing import Any

from stretto.core import Group


def by_kind(
    groups: list[Group], kinds: dict[str, str], options: dict[str, dict[str, Any]], others: dict[str, Any]
) -> list[Group]:
    """The groups, each cut into the parameters of kinds that have options of their own, and the others."""
    cut: list[Group] = []
    for group in groups:
        named = list(zip(group["names"], group["params"]))
        for kind, theirs in [*options.items(), (None, others)]:
            pairs = [(n, p) for n, p in named if (kinds[n] if kinds[n] in options else None) == kind]
            if pairs:
                names, params = map(list, zip(*pairs))
                cut.append(group | theirs | {"names": names, "params": params})
    return cut
