"""The page of a race: one HTML file that loads nothing, readable offline, in print and in the dark."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .statistics import figure
from .store import Run, Store
from .summary import Points, Summary, cells, count, plain, seconds, size, summarise, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plain", "summarise", "table", "write"]

MAX_POINTS = 4000  # drawn in a figure, over all lines, so that the page stays below a megabyte


def write(store: Store, race_id: str, path: str | Path) -> Path:
    """Write a stored race's page: one HTML file that loads nothing. ValueError if it cannot be written."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    summary = summarise(store, store.race(race_id))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(seconds=seconds, count=count, size=size, figure=figure, fields=_fields)
    environment.filters.update(drawing=Markup, tied=_tied)
    timed = any(point[1] for arm in summary.arms for result in arm.results for point in result.points)
    head, rows = cells(summary)
    page = environment.get_template("report.html.jinja").render(
        summary=summary,
        race=summary.race,
        head=head,
        rows=rows,
        created=_day(summary.race["created"]),
        figures=[_curves(summary, name) for name in (("time", "steps") if timed else ("steps",))],
        forest=_forest(summary),
        colours=[_colour(summary, index) for index in range(len(summary.arms))],
        facts={part: _facts(summary.runs, part) for part in ("machine", "execution", "versions")},
    )
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the report {path} cannot be written ({error.strerror}); choose another") from error
    return path


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


# ---- figures: matplotlib draws them in stand-in colours, which become the page's CSS variables

PALETTE = ["--ink", "--muted", "--line", "--reference", "--control", *(f"--arm-{hue}" for hue in range(6))]
STAND_INS = {variable: f"#0a0b{index:02x}" for index, variable in enumerate(PALETTE)}
INK, MUTED, LINE = STAND_INS["--ink"], STAND_INS["--muted"], STAND_INS["--line"]
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stretto",
    "path.simplify": False,
    "font.size": 10.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
}


def _colour(summary: Summary, index: int) -> str:
    """The CSS variable of an arm's colour: greys for the reference and its control, a hue for each other."""
    race, names = summary.race, [arm.name for arm in summary.arms]
    if names[index] == race["reference"]:
        return "--reference"
    if names[index] == race.get("control"):
        return "--control"
    before = [name for name in names[:index] if name not in (race["reference"], race.get("control"))]
    return f"--arm-{len(before) % 6}"


@dataclass(frozen=True)
class Curves:
    """A figure of a line a run; `lines` holds what the page's script reads out.

    Each has a label and points (x, y, step, seconds, metric), x and y in units of the drawing.
    """

    name: str
    title: str
    svg: str
    lines: list[dict[str, Any]]


def _curves(summary: Summary, name: str) -> Curves:
    """The metric against "time" or "steps", a line a run, the target dashed."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    race, axis = summary.race, 1 if name == "time" else 0
    metric, target = race["metric"], race["target"]
    runs = [(index, arm, result) for index, arm in enumerate(summary.arms) for result in arm.results]
    most = min(200, max(20, MAX_POINTS // max(1, len(runs))))
    drawn: list[tuple[str, Points]] = []
    late = [] if target is None else [target]  # what the frame must hold: all but the first tenth of a run
    with matplotlib.rc_context(SETTINGS):
        canvas, axes = _axes(5.2, 3.5, left=46, right=42, top=14, bottom=40)
        for index, arm, result in runs:
            points = _thinned([point for point in result.points if axis == 0 or point[1]], most)
            late += [point[2] for point in points[len(points) // 10 :]]
            colour = STAND_INS[_colour(summary, index)]
            grey = arm.name in (race["reference"], race.get("control"))
            axes.plot(
                [point[axis] for point in points],  # type: ignore[arg-type]
                [point[2] for point in points],
                color=colour,
                linewidth=1.0 if grey else 1.4,
                linestyle=(0, (2.5, 1.5)) if arm.name == race.get("control") else "solid",
                gid=f"run-{len(drawn)}",
            )
            if points:
                end = min(points, key=lambda point: abs(point[0] - result.steps))
                mark = "o" if result.reached else "x"
                axes.plot(end[axis], end[2], mark, color=colour, markersize=4, zorder=3)  # type: ignore[arg-type]
            drawn.append((f"{arm.label}, seed {result.seed}", points))
        if target is not None:
            axes.axhline(target, color=INK, linestyle=(0, (4, 3)), linewidth=0.9)
            axes.annotate("target", (1, target), (5, -3), ("axes fraction", "data"), "offset points")
        if axis:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("training time in seconds, logarithmic" if axis else "steps")
        axes.set_ylabel(metric)
        low, high = min(late, default=0.0), max(late, default=1.0)
        axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
        svg = _svg(
            canvas, name, f"{metric} against {name}, a line a run; the runs' ends are in the table below"
        )
        frame = axes.get_window_extent()
        lines = []
        for label, points in drawn:
            spots = [axes.transData.transform((point[axis] or 0, point[2])) for point in points]
            inside = [
                [
                    round(float(x), 1),
                    round(float(canvas.bbox.height - y), 1),
                    step,
                    _short(wall),
                    _short(value),
                ]
                for (x, y), (step, wall, value) in zip(spots, points)
                if frame.y0 <= y <= frame.y1
            ]
            lines.append({"label": label, "points": inside})
    return Curves(name, f"{metric.capitalize()} against {name}", svg, lines)


def _thinned(points: Points, most: int) -> Points:
    """At most so many of the points, evenly chosen, first and last kept."""
    if len(points) <= most:
        return points
    return [points[index * (len(points) - 1) // (most - 1)] for index in range(most)]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _forest(summary: Summary) -> str | None:
    """Speed-ups over the reference with their intervals, wall time filled and CPU time hollow."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    arms = [(index, arm, arm.wall) for index, arm in enumerate(summary.arms) if arm.wall and arm.wall.figures]
    if not arms:
        return None
    ends = [1.0]
    with matplotlib.rc_context({**SETTINGS, "axes.spines.left": False}):
        canvas, axes = _axes(5.2, 0.75 + 0.5 * len(arms), left=104, right=116, top=8, bottom=36)
        for row, (index, arm, wall) in enumerate(arms):
            colour = STAND_INS[_colour(summary, index)]
            for found, y, face in ((wall, row - 0.13, colour), (arm.cpu, row + 0.17, "none")):
                if found is None:
                    continue
                mark, limits = "o", [value for value in (found.low, found.high) if 0 < value < math.inf]
                if found.method == "bound":
                    mark = ">" if found.low > 0 else "<"
                else:
                    axes.plot(
                        limits, [y] * len(limits), color=colour, linewidth=1.0 if face == "none" else 1.8
                    )
                places = [found.estimate] if found.estimate else limits
                axes.plot(
                    places,
                    [y] * len(places),
                    mark,
                    color=colour,
                    markerfacecolor=face,
                    markersize=6,
                    zorder=3,
                )
                ends += limits + places
            words = wall.figures.split(" (")[0]
            axes.annotate(words, (1, row), (8, -3), ("axes fraction", "data"), "offset points")
        axes.axvline(1, color=INK, linewidth=0.9)
        axes.set_xscale("log")
        spread = max(ends) / min(ends)
        axes.set_xlim(min(ends) / spread**0.08 / 1.02, max(ends) * spread**0.08 * 1.02)
        dense = LogLocator(subs=(1.0, 2.0, 5.0)) if spread < 30 else LogLocator()
        axes.xaxis.set_major_locator(MaxNLocator(4) if spread < 4 else dense)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(len(arms) - 0.4, -0.6)
        names = [arm.label if len(arm.label) < 19 else arm.label[:17] + "…" for _, arm, _ in arms]
        axes.set_yticks(range(len(arms)), names, color=INK)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("times sooner, logarithmic")
        return _svg(canvas, "forest", "speed-ups with their intervals, as in the table of the race")


def _axes(width: float, height: float, left: int, right: int, top: int, bottom: int) -> tuple[Figure, Axes]:
    """A figure of inches at 72 points, so that a display unit is a unit of the SVG; margins in points."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    canvas = Figure((width, height), dpi=72)
    FigureCanvasSVG(canvas)
    x, y = 72 * width, 72 * height
    axes = canvas.add_axes((left / x, bottom / y, 1 - (left + right) / x, 1 - (top + bottom) / y))
    axes.set_axisbelow(True)
    return canvas, axes


def _svg(canvas: Figure, name: str, label: str) -> str:
    """The figure as an element of the page: own ids, the colours and font of the page, no metadata."""
    from markupsafe import escape

    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.savefig(file, format="svg", metadata=nothing, transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r"(?<=: )#0a0b([0-9a-f]{2})", lambda match: f"var({PALETTE[int(match[1], 16)]})", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return svg.replace("<svg ", f'<svg role="img" tabindex="0" aria-label="{escape(label)}" ', 1)
