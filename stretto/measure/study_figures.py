"""The figures of a study: what each method gives, asked in three ways, and what pairs give together."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from stretto.measure.drawing import Colours, Drawing, Line
from stretto.measure.figures import WIDTH, _labelled, _ratios
from stretto.measure.outcomes import Interval
from stretto.measure.statistics import figure
from stretto.measure.study_summary import StudySummary, factor, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = (("o", "--arm-0"), ("s", "--arm-1"), ("D", "--ink"))  # of the three answers


def drawings(summary: StudySummary) -> list[Drawing]:
    """All figures of a study for which it has numbers."""
    return [found for found in (effects(summary), heat_map(summary)) if found]


def effects(summary: StudySummary) -> Drawing | None:
    """Each method alone, in company and on average, as factors of speed with their intervals."""
    rows = [
        (one.method, [found and factor(found) for found in (one.alone, one.in_company, one.on_average)])
        for one in summary.answers
    ]
    if not any(found for _, told in rows for found in told):
        return None
    return Drawing(
        "effects", "Each method, asked in three ways",
        "factors of speed of each method alone, in company and on average, as in the table of methods",
        (WIDTH, 0.75 + 0.62 * len(rows)), (12, 116, 8, 36), partial(_draw_effects, rows),
        "Circle: alone. Square: in company of all others. Diamond: on average, also in figures. Bars are 95 % "
        "intervals.",
    )  # fmt: skip


def _draw_effects(rows: list[tuple[str, list[Interval | None]]], axes: Axes, palette: Colours) -> list[Line]:
    ends = [1.0]
    for y, (_, told) in enumerate(rows):
        for index, (found, (mark, variable)) in enumerate(zip(told, MARKS)):
            if found is None:
                continue
            height = y - 0.08 + 0.2 * index
            limits = [value for value in (found.low, found.high) if 0 < value < math.inf]
            axes.plot(limits, [height] * len(limits), color=palette[variable], linewidth=1.4)
            axes.plot([found.estimate], [height], mark, color=palette[variable], markersize=5, zorder=3)
            ends += [found.estimate, *limits]
        if average := told[-1]:
            at = (1, y + 0.32)
            axes.annotate(shown(average), at, (8, -3), ("axes fraction", "data"), "offset points")
    axes.axvline(1, color=palette["--ink"], linewidth=0.9)
    _ratios(axes, ends)
    _labelled(axes, [method for method, _ in rows], 54, palette)
    axes.set_xlabel("times sooner, logarithmic")
    return []


def heat_map(summary: StudySummary) -> Drawing | None:
    """What each pair gives of the product of its parts."""
    told = {pair: factor(found) for pair, found in summary.interactions.items() if found}
    if not told:
        return None
    k = len(summary.methods)
    return Drawing(
        "interactions", "What pairs give of the product of their parts",
        "interactions of pairs of methods, as in the table of pairs",
        (WIDTH, 0.45 + 0.42 * k), (128, 12, 6, 24), partial(_draw_heat, summary.methods, told),
        "Below 1x, orange: together they give less than what they give alone promises. Above 1x, blue: more. "
        "Framed: the interval excludes 1x.",
    )  # fmt: skip


def _draw_heat(
    methods: tuple[str, ...], told: dict[tuple[str, str], Interval], axes: Axes, palette: Colours
) -> list[Line]:
    from matplotlib.patches import Rectangle

    k = len(methods)
    most = max(max(abs(math.log(found.estimate)) for found in told.values()), 0.05)
    for j, i in combinations(range(k), 2):
        found = told.get((methods[j], methods[i]))
        if found is None:
            axes.annotate("·", (j, i), ha="center", va="center", color=palette["--muted"])
            continue
        strength = math.log(found.estimate) / most
        colour = palette["--arm-0" if strength > 0 else "--arm-1"]
        corner = (j - 0.46, i - 0.46)
        axes.add_patch(
            Rectangle(corner, 0.92, 0.92, facecolor=colour, alpha=0.08 + 0.5 * abs(strength), linewidth=0)
        )
        if found.low > 1 or found.high < 1:
            axes.add_patch(
                Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=palette["--ink"], linewidth=1.1)
            )
        text = f"{figure(found.estimate)}x"
        axes.annotate(text, (j, i), ha="center", va="center", fontsize=9.5 if k < 9 else 7)
    axes.set_xlim(-0.5, k - 1.5)
    axes.set_ylim(k - 0.5, -0.4)
    names = [name if len(name) < 20 else name[:18] + "…" for name in methods]
    axes.set_yticks(range(k), [f"{index + 1} {name}" for index, name in enumerate(names)])
    axes.set_xticks(range(k - 1), [str(index + 1) for index in range(k - 1)])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return []
