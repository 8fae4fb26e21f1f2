"""Figures drawn once and shown twice: as SVG in the colours and font of the page, and on a sheet for PNG or PDF."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Hues by Okabe and Ito 2008, told apart by colour-blind readers, darkened or lightened for contrast with paper.
LIGHT = {
    "--paper": "#fdfcfa", "--ink": "#1c1d1f", "--muted": "#63666b", "--line": "#e3e1dc", "--tint": "#f5f3ee",
    "--reference": "#4d4f53", "--control": "#94979c", "--other": "#b9bbbf",
    "--arm-0": "#0072b2", "--arm-1": "#d55e00", "--arm-2": "#008a64", "--arm-3": "#b8558f",
    "--arm-4": "#b97a00", "--arm-5": "#2b8fc9",
}  # fmt: skip
DARK = {
    "--paper": "#16181b", "--ink": "#e9e7e2", "--muted": "#a2a5aa", "--line": "#303338", "--tint": "#1e2125",
    "--reference": "#c3c5c9", "--control": "#83868b", "--other": "#565a60",
    "--arm-0": "#56b4e9", "--arm-1": "#f0803c", "--arm-2": "#2fc59b", "--arm-3": "#e29ac2",
    "--arm-4": "#e69f00", "--arm-5": "#f0e442",
}  # fmt: skip
HUES = 6
NAMES = list(LIGHT)
STAND_INS = {name: f"#0a0b{index:02x}" for index, name in enumerate(NAMES)}  # become the page's CSS variables

Colours = Mapping[str, str]  # from CSS variables to what matplotlib draws


class Line(NamedTuple):
    """What can be read out of a drawn line: its points as (x, y) of the axes, step, seconds and metric."""

    label: str
    points: list[tuple[float, float, int, float | None, float]]


@dataclass(frozen=True)
class Drawing:
    """A figure: `draw` fills axes in the colours that it is given and returns the lines that can be read out."""

    name: str
    title: str
    description: str  # for readers who cannot see it
    size: tuple[float, float]  # inches
    margins: tuple[int, int, int, int]  # left, right, top, bottom, in points
    draw: Callable[[Axes, Colours], list[Line]]
    caption: str = ""


class Drawn(NamedTuple):
    """A drawing as an element of the page; points of `lines` are (x, y, step, seconds, metric), in its units."""

    drawing: Drawing
    svg: str
    lines: list[dict[str, Any]]


def svg(drawing: Drawing, prefix: str = "") -> Drawn:
    """The drawing as SVG whose ids start with the prefix and the drawing's name."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width, height = drawing.size
    canvas = Figure((width, height), dpi=72)  # so that a display unit is a unit of the SVG
    FigureCanvasSVG(canvas)
    with matplotlib.rc_context(_settings(STAND_INS)):
        axes = _place(canvas, drawing, 0, 0)
        lines = drawing.draw(axes, STAND_INS)
        text = _element(canvas, f"{prefix}{drawing.name}", drawing.description)
    return Drawn(drawing, text, [_readable(line, axes) for line in lines])


def sheet(drawings: Sequence[Drawing], title: str, path: Path) -> None:
    """All drawings below each other in light colours, in the format of the path's ending, which may be PDF."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gap = 34  # points, for a title
    width = max(drawing.size[0] for drawing in drawings)
    height = sum(72 * drawing.size[1] + gap for drawing in drawings) + gap
    canvas = Figure((width, height / 72), dpi=72)
    FigureCanvasAgg(canvas)
    with matplotlib.rc_context({**_settings(LIGHT), "svg.fonttype": "path"}):
        canvas.text(12 / 72 / width, 1 - 20 / height, title, fontsize=13, color=LIGHT["--ink"])
        bottom = height - gap
        for drawing in drawings:
            canvas.text(12 / 72 / width, (bottom - 22) / height, drawing.title, weight="bold")
            bottom -= 72 * drawing.size[1] + gap
            drawing.draw(_place(canvas, drawing, 0, bottom), LIGHT)
        metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
        canvas.savefig(path, dpi=200, facecolor=LIGHT["--paper"], metadata=metadata)


def _settings(colours: Colours) -> dict[Any, Any]:
    ink, muted, line = (colours[name] for name in ("--ink", "--muted", "--line"))
    return {
        "svg.fonttype": "none", "svg.hashsalt": "stretto", "path.simplify": False, "pdf.fonttype": 42,
        "font.size": 10.5, "text.parse_math": False, "text.color": ink, "axes.labelcolor": muted,
        "axes.edgecolor": muted, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
        "axes.facecolor": "none", "axes.grid": True, "grid.color": line, "grid.linewidth": 0.6,
        "xtick.color": muted, "ytick.color": muted, "xtick.minor.size": 0, "ytick.major.size": 0,
    }  # fmt: skip


def _place(canvas: Figure, drawing: Drawing, x: float, y: float) -> Axes:
    """Axes for the drawing whose lower left corner lies at (x, y), in points."""
    left, right, top, bottom = drawing.margins
    width, height = (72 * inches for inches in canvas.get_size_inches())
    own_width, own_height = (72 * inches for inches in drawing.size)
    axes = canvas.add_axes(
        (
            (x + left) / width,
            (y + bottom) / height,
            (own_width - left - right) / width,
            (own_height - top - bottom) / height,
        )
    )
    axes.set_axisbelow(True)
    return axes


def _readable(line: Line, axes: Axes) -> dict[str, Any]:
    """A line's points in units of the SVG; those outside the frame are left out."""
    frame, top = axes.get_window_extent(), axes.figure.bbox.height
    found = []
    if line.points:
        spots = axes.transData.transform([point[:2] for point in line.points])
        for (x, y), (_, _, step, wall, value) in zip(spots.tolist(), line.points):
            if frame.y0 <= y <= frame.y1:
                found.append([round(x, 1), round(top - y, 1), step, _short(wall), _short(value)])
    return {"label": line.label, "points": found}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _element(canvas: Figure, name: str, description: str) -> str:
    """The canvas as an element of the page: own ids, the colours and font of the page, no metadata."""
    from markupsafe import escape

    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"(?<=[ML] )(-?[\d.]+) (-?[\d.]+)(?= )", _rounded, text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r"(?<=: )#0a0b([0-9a-f]{2})", lambda match: f"var({NAMES[int(match[1], 16)]})", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return text.replace("<svg ", f'<svg role="img" tabindex="0" aria-label="{escape(description)}" ', 1)


def _rounded(point: re.Match[str]) -> str:
    return f"{float(point[1]):.1f} {float(point[2]):.1f}"
