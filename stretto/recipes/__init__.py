"""Recipes by workload, each with the batch size and budget it was tuned for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stretto import methods
from stretto.core import Recipe, nearest
from stretto.recipes import digits, stdlib_gpt


@dataclass(frozen=True)
class Arm:
    """A recipe as it is run: with a batch size and a budget, both in examples (None: the workload's)."""

    name: str
    recipe: Recipe
    batch: int | None = None
    budget: int | None = None


WORKLOADS: dict[str, Any] = {"stdlib-gpt": stdlib_gpt, "digits": digits}


def raced(workload: str, target: str) -> dict[str, Arm]:
    """The arms that race for a target unless others are named, the reference first."""
    parts = WORKLOADS[workload].RACES[target]
    return {name: Arm(name, *settings) for name, settings in parts.items()}


def arms(workload: str, target: str) -> dict[str, Arm]:
    """All named arms of a workload for one of its targets."""
    more = getattr(WORKLOADS[workload], "MORE", {}).get(target, {})
    return raced(workload, target) | {name: Arm(name, *settings) for name, settings in more.items()}


def arm(text: str, workload: str, target: str) -> Arm:
    """Read an arm: a name, a short form or a JSON file, then perhaps `@ budget=EXAMPLES batch=EXAMPLES`.

    Raises ValueError naming what is unknown, with the nearest known names.
    """
    what, _, settings = (part.strip() for part in text.partition("@"))
    named = arms(workload, target)
    if what.endswith(".json"):
        found = _read_file(Path(what))
    elif what in named:
        found = named[what]
    elif re.fullmatch(r"[a-z0-9-]+", what) and not _is_method(what):
        raise ValueError(f"{workload} has no recipe {what!r}; {nearest(what, named)}")
    else:
        found = Arm(what, methods.parse(what))
    return _with_settings(found, settings) if settings else found


def _is_method(name: str) -> bool:
    try:
        methods.find(name)
    except ValueError:
        return False
    return True


def _read_file(path: Path) -> Arm:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no recipe file that can be read: {error}") from None
    if not isinstance(data, dict) or "methods" not in data:
        raise ValueError(
            f'{path} holds no recipe; it should look like {{"methods": [{{"method": "adamw"}}]}}'
        )
    recipe = methods.from_json({"methods": data["methods"]})
    return Arm(data.get("name", path.stem), recipe, data.get("batch"), data.get("budget"))


def _with_settings(found: Arm, settings: str) -> Arm:
    changes: dict[str, int] = {}
    for setting in settings.replace(",", " ").split():
        name, _, value = setting.partition("=")
        if name not in ("batch", "budget"):
            raise ValueError(f"an arm has no setting {name!r}; {nearest(name, ('batch', 'budget'))}")
        if not value.isdigit() or int(value) < 1:
            raise ValueError(f"{name} is {value!r}; it is a number of examples, 1 or more")
        changes[name] = int(value)
    named = f"{found.name} @ {' '.join(f'{k}={v}' for k, v in changes.items())}"
    return replace(found, name=named, **changes)  # type: ignore[arg-type]
