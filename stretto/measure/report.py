"""The page of races and studies: one HTML file that loads nothing, readable offline, in print and in the dark."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import drawing, equal_figures, figures, study_figures
from .equal import equal_cells
from .misses import missed
from .on_the_way import on_the_way
from .sources import Part, race_part
from .statistics import figure
from .store import Run, Store
from .study_summary import factor, shown
from .suite import suites
from .summary import cells, count, plain, seconds, size, summarise, table

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["page", "plain", "sheet", "summarise", "table", "write", "write_text"]


def write(store: Store, race_id: str, path: str | Path) -> Path:
    """Write a stored race's page: one HTML file that loads nothing. ValueError if it cannot be written."""
    return write_text(page([race_part(store, race_id)]), Path(path))


def write_text(text: str, path: Path) -> Path:
    """Write a report, in a folder that is made where it lacks. ValueError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the report {path} cannot be written ({error.strerror}); choose another") from error
    return path


def sheet(parts: Sequence[Part], path: Path) -> Path:
    """Write the figures of the reports on a sheet, as PNG or PDF. ValueError if there are none, or it cannot be
    written.
    """
    drawings = [one for part in parts for one in part_drawings(part)]
    if not any(arm.results for part in parts for arm in part.summary.arms):
        raise ValueError("there is no figure to draw: no run has finished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.sheet(drawings, "; ".join(part.title for part in parts), path)
    except OSError as error:
        raise ValueError(f"the report {path} cannot be written ({error.strerror}); choose another") from error
    return path


def part_drawings(part: Part) -> list[drawing.Drawing]:
    """All figures of a report, those of a study or of equal quality first."""
    return [*_own_drawings(part), *figures.drawings(part.summary)]


def _own_drawings(part: Part) -> list[drawing.Drawing]:
    if part.study:
        return study_figures.drawings(part.study)
    return equal_figures.drawings(part.equal) if part.equal else []


def page(parts: Sequence[Part]) -> str:
    """The reports on one page, each under a title of its own."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        seconds=seconds, count=count, size=size, figure=figure, fields=_fields, drawing=Markup, tied=_tied,
        breaking=_breaking, interval=shown, factor=lambda effect: effect and factor(effect),
    )  # fmt: skip
    shown_parts = [_shown(part, f"part-{n}-" if n else "") for n, part in enumerate(parts)]
    over = suites([part.summary for part in parts])
    return environment.get_template("report.html.jinja").render(
        suites=over, parts=shown_parts, infinity=math.inf, light=drawing.LIGHT, dark=drawing.DARK
    )


def _shown(part: Part, prefix: str) -> dict[str, Any]:
    """What the template asks of a report."""
    summary, study = part.summary, part.study
    head, rows = cells(summary)
    colours = figures.colours(summary)
    legend = [(i, arm.label) for i, arm in enumerate(summary.arms) if colours[i] != "--other"]
    if "--other" in colours:
        legend.append((colours.index("--other"), "the others"))
    return {
        "kind": part.kind,
        "id": part.id,
        "title": part.title,
        "created": _day(part.created),
        "prefix": prefix,
        "summary": summary,
        "study": study,
        "equal": part.equal,
        "hues": equal_figures.hues(part.equal) if part.equal else [],
        "equal_cells": equal_cells(part.equal) if part.equal else None,
        "warnings": [*part.notes, *summary.warnings],
        "colours": colours,
        "legend": legend,
        "head": head,
        "rows": rows,
        "figures": [drawing.svg(one, prefix) for one in figures.drawings(summary)],
        "own_figures": [drawing.svg(one, prefix) for one in _own_drawings(part)],
        "pairs": [pair for pair in part.pairs if pair[1]],
        "way": on_the_way(summary),
        "missed": missed(summary),
        "costs": figures.costs(summary),
        "operations": figures.operations(summary),
        "places": figures.places(summary),
        "timed": summary.timed,
        "facts": {part: _facts(summary.runs, part) for part in ("machine", "execution", "versions")},
    }


def _day(created: str) -> str:
    try:
        return f"{datetime.fromisoformat(created):%d %B %Y, %H:%M %Z}".lstrip("0")
    except ValueError:
        return created


TIES = re.compile(
    r"(?<=,) (?=[\d.]+\])|(?<=x) (?=\[)|(?<=\(no) (?=verdict)|(?<=\d) (?=×)|(?<=×) (?=\d)|(?<=[<>]) (?=\d)"
    r"|(?<=[a-z]) (?=[\d.]+$)|(?<=\d) (?=(s|min|h|k|M|G|MB|GB|%|seeds?)\b)"
)


def _tied(text: str) -> str:
    """Text whose intervals, products and units stay on one line."""
    return TIES.sub("\N{NO-BREAK SPACE}", text.replace("one-sided", "one\N{NON-BREAKING HYPHEN}sided"))


def _breaking(text: str) -> Markup:
    """A name that may go on in the next line after each underscore."""
    from markupsafe import Markup, escape

    return Markup(str(escape(text)).replace("_", "_<wbr>"))


def _fields(method: dict[str, Any]) -> list[tuple[str, str]]:
    """A method's fields as text."""
    return [(key, json.dumps(value)) for key, value in method.items() if key != "method"]


def _facts(runs: Sequence[Run], part: str) -> dict[str, str]:
    """One part of the runs' records, each key with all its different values."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for key, value in (run.record.get(part) or {}).items():
            text = value if isinstance(value, str) else json.dumps(value)
            if text not in found.setdefault(key, []):
                found[key].append(text)
    return {key: "; ".join(values) for key, values in found.items()}
