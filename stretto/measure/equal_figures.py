"""The figure of a comparison at equal quality: the speed-up of each recipe against quality, with its band."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from stretto.measure.drawing import Colours, Drawing, Line
from stretto.measure.equal import Contestant, EqualSummary
from stretto.measure.figures import WIDTH, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOM = 2.0  # times beyond the estimates that a limit may lie and still be in the frame


def drawings(summary: EqualSummary) -> list[Drawing]:
    """All figures of a comparison for which it has numbers."""
    if not any(found.speed_up.figures for one in summary.contestants for found in one.at):
        return []
    base, metric = summary.record["base"], summary.race.race["metric"]
    return [
        Drawing(
            "equal-quality", f"Speed-up over {base} at equal {metric}",
            "speed-ups against quality, a line a recipe with its band, as in the table of budgets",
            (WIDTH, 3.4), (46, 96, 14, 40), partial(_draw, summary),
            f"Lines: at each {metric} that both reach. Dots: at what the recipe's own budgets reach. Bands and "
            "bars are 95 % intervals; an arrowhead is a one-sided bound.",
        )
    ]  # fmt: skip


def hues(summary: EqualSummary) -> list[str]:
    """The CSS variable of each contestant's colour, that of its runs."""
    of_arms = {arm.name: colour for arm, colour in zip(summary.race.arms, colours(summary.race))}
    arms = {arm["recipe"]: arm["name"] for arm in summary.record["arms"]}
    found = [of_arms[arms[one.name]] for one in summary.contestants]
    return [colour if colour != "--other" else "--muted" for colour in found]


def _draw(summary: EqualSummary, axes: Axes, palette: Colours) -> list[Line]:
    told = [found.speed_up for one in summary.contestants for found in (*one.at, *one.curve)]
    centres = [1.0, *(found.estimate for found in told if found.estimate)]
    centres += [
        limit for found in told if not found.estimate for limit in (found.low, found.high) if _finite(limit)
    ]
    least, most = min(centres) / ROOM, max(centres) * ROOM
    ends = [*centres, *(end for found in told for end in (found.low, found.high) if least < end < most)]
    low, high = min(ends) / 1.04, max(ends) * 1.04
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    for one, colour in zip(summary.contestants, hues(summary)):
        _draw_one(one, axes, palette[colour], (low, high))
    axes.axhline(1, color=palette["--ink"], linewidth=0.9)
    _ratios(axes)
    axes.margins(x=0.06)
    if summary.race.race["falls"]:
        axes.invert_xaxis()
    axes.set_xlabel(f"{summary.race.race['metric']}, better to the right")
    axes.set_ylabel("times as fast, logarithmic")
    return []


def _draw_one(one: Contestant, axes: Axes, colour: str, frame: tuple[float, float]) -> None:
    curve = [(found.quality, found.speed_up) for found in one.curve]
    qualities = [quality for quality, _ in curve]
    lows = [_inside(ratio.low, frame) for _, ratio in curve]
    highs = [_inside(ratio.high, frame) for _, ratio in curve]
    axes.fill_between(qualities, lows, highs, color=colour, alpha=0.16, linewidth=0)
    axes.plot(qualities, [ratio.estimate or math.nan for _, ratio in curve], color=colour, linewidth=1.6)
    for found in one.at:
        ratio = found.speed_up
        ends = [_inside(end, frame) for end in (ratio.low, ratio.high)]
        if ratio.estimate:
            axes.plot([found.quality] * 2, ends, color=colour, linewidth=1.1)
            axes.plot([found.quality], [ratio.estimate], "o", color=colour, markersize=5, zorder=3)
        elif ratio.figures:
            at, mark = (ratio.low, "^") if ratio.low > 0 else (ratio.high, "v")
            axes.plot([found.quality], [at], mark, color=colour, markersize=6, zorder=3)
    last = one.at[-1]
    height = last.speed_up.estimate or (last.speed_up.low if last.speed_up.low > 0 else last.speed_up.high)
    text = one.name if len(one.name) < 17 else one.name[:15] + "…"
    axes.annotate(
        text, (1, _inside(height, frame)), (6, -3), ("axes fraction", "data"), "offset points", color=colour
    )


def _inside(end: float, frame: tuple[float, float]) -> float:
    return min(max(end, frame[0]), frame[1])


def _finite(limit: float) -> bool:
    return 0 < limit < math.inf


def _ratios(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MaxNLocator(4) if high / low < 4 else LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}x"))
    axes.yaxis.set_minor_locator(NullLocator())
