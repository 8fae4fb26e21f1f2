"""The figures of a race: its curves, speed-ups, costs, and the frontier of cost and quality."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from stretto.measure import quality
from stretto.measure.drawing import HUES, Colours, Drawing, Line
from stretto.measure.misses import reached_by_then
from stretto.measure.statistics import SpeedUp, figure, geometric_mean
from stretto.measure.summary import Arm, Points, Summary, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 4000  # drawn in a figure, over all lines, so that the page stays small
MANY = 8  # arms; more are sorted, the fastest in colour
WIDTH = 5.2  # inches


class Cost(NamedTuple):
    """A speed-up, compiling counted, as the product of three; above 1 is better in each."""

    step_efficiency: float
    step_cost: float
    overhead: float

    @property
    def total(self) -> float:
        """Their product."""
        return math.prod(self)


def colours(summary: Summary) -> list[str]:
    """The CSS variable of each arm's colour: greys for the reference and its control, a hue for each other; of
    many arms, for the fastest. Arms of one recipe, where the race says so, share theirs.
    """
    race = summary.race
    recipes = {arm.name: race.get("recipes", {}).get(arm.name, arm.name) for arm in summary.arms}
    reference = recipes.get(race["reference"], race["reference"])
    grey = {reference: "--reference", race.get("control"): "--control"}
    others = [name for name in dict.fromkeys(recipes.values()) if name not in grey]
    if len(others) > MANY:
        best = dict.fromkeys(recipes[arm.name] for arm, _ in summary.answers)
        others = [name for name in best if name not in grey][:HUES]
    hues = {name: f"--arm-{index % HUES}" for index, name in enumerate(others)}
    return [grey.get(name) or hues.get(name, "--other") for name in recipes.values()]


def costs(summary: Summary) -> dict[str, Cost]:
    """Each arm's decomposition, by name; overhead is what compiling once adds to the time of a run."""
    reference = next((arm for arm in summary.arms if arm.name == summary.race["reference"]), None)
    if reference is None:
        return {}
    return {
        arm.name: Cost(*arm.parts, _compiling(reference) / _compiling(arm))
        for arm in summary.arms
        if arm.parts
    }


def _compiling(arm: Arm) -> float:
    return geometric_mean([1 + result.compile / (result.wall or 1.0) for result in arm.results])


def operations(summary: Summary) -> dict[str, float]:
    """How many times fewer operations a step of each arm takes, by name: what its step cost would be if time went
    by them. Both far apart tell of a step that waits, or of work that is no product.
    """
    base = next((arm.flops for arm in summary.arms if arm.name == summary.race["reference"]), None)
    return {arm.name: base / arm.flops for arm in summary.arms if base and arm.flops}


def places(summary: Summary) -> dict[str, quality.Place]:
    """Where the arms lie between cost, their runs' seconds (steps where some have none), and quality at the
    end of their runs, the control left out; empty unless two arms have two seeds.
    """
    arms = {arm.name: _ends(summary, arm) for arm in summary.arms if arm.name != summary.race.get("control")}
    arms = {name: ends for name, ends in arms.items() if len(ends) > 1}
    return quality.on_frontier(arms, falls=summary.race["falls"]) if len(arms) > 1 else {}


def _ends(summary: Summary, arm: Arm) -> list[tuple[float, float]]:
    axis = 1 if summary.timed else 0
    last = [result.points[-1] for result in arm.results if result.points and result.state != "failed"]
    return [(float(point[axis] or point[0]), point[2]) for point in last]


def drawings(summary: Summary) -> list[Drawing]:
    """All figures of a race for which it has numbers."""
    has_seconds = any(point[1] for arm in summary.arms for result in arm.results for point in result.points)
    found = [curves(summary, name) for name in (("time", "steps") if has_seconds else ("steps",))]
    misses = reached_by_then(summary, colours(summary))
    return [*found, *filter(None, (forest(summary), misses, cost_bars(summary), frontier(summary)))]


def curves(summary: Summary, name: str) -> Drawing:
    """The metric against "time" or "steps", a line a run, the target dashed."""
    metric = summary.race["metric"]
    description = f"{metric} against {name}, a line a run; the runs' ends are in the table below"
    return Drawing(
        name, f"{metric.capitalize()} against {name}", description, (WIDTH, 3.5), (46, 42, 14, 40),
        partial(_draw_curves, summary, 1 if name == "time" else 0),
    )  # fmt: skip


def _draw_curves(summary: Summary, axis: int, axes: Axes, palette: Colours) -> list[Line]:
    from matplotlib.lines import Line2D

    race, target = summary.race, summary.race["target"]
    runs = [
        (arm, result, colour) for arm, colour in zip(summary.arms, colours(summary)) for result in arm.results
    ]
    most, thin = min(200, max(10, MAX_POINTS // max(1, len(runs)))), 0.5 if len(runs) > 60 else 1.0
    late = [] if target is None else [target]  # what the frame must hold: all but the first tenth of a run
    lines: list[Line] = []
    ends: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for arm, result, variable in runs:
        points = _thinned([point for point in result.points if axis == 0 or point[1]], most)
        late += [point[2] for point in points[len(points) // 10 :]]
        control, grey = arm.name == race.get("control"), not variable.startswith("--arm")
        line = Line2D(
            [float(point[axis] or 0) for point in points],
            [point[2] for point in points],
            color=palette[variable],
            linewidth=(1.0 if grey else 1.4) * thin,
            linestyle=(0, (2.5, 1.5)) if control else "solid",
            zorder=2.0 if grey else 2.5,
            gid=f"run-{len(lines)}",
        )
        axes.add_line(line)
        if points:
            end = min(points, key=lambda point: abs(point[0] - result.steps))
            mark = "o" if result.reached else "x"
            ends.setdefault((variable, mark), []).append((float(end[axis] or 0), end[2]))
        label = f"{arm.label}, seed {result.seed}"
        lines.append(Line(label, [(float(p[axis] or 0), p[2], *p) for p in points]))
    for (variable, mark), places in ends.items():
        axes.plot(*zip(*places), mark, color=palette[variable], markersize=4 * thin, zorder=3)
    axes.autoscale_view()
    if target is not None:
        axes.axhline(target, color=palette["--ink"], linestyle=(0, (4, 3)), linewidth=0.9)
        axes.annotate("target", (1, target), (5, -3), ("axes fraction", "data"), "offset points")
    if axis:
        _logarithmic(axes, "{:g}")
    axes.set_xlabel("training time in seconds, logarithmic" if axis else "steps")
    axes.set_ylabel(race["metric"])
    low, high = min(late, default=0.0), max(late, default=1.0)
    axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
    return lines


def _thinned(points: Points, most: int) -> Points:
    """At most so many of the points, evenly chosen, first and last kept."""
    if len(points) <= most:
        return points
    return [points[index * (len(points) - 1) // (most - 1)] for index in range(most)]


def forest(summary: Summary) -> Drawing | None:
    """Speed-ups over the reference with their intervals, wall time filled and CPU time hollow."""
    rows = [
        (arm, arm.wall, colour)
        for arm, colour in zip(summary.arms, colours(summary))
        if arm.wall and arm.wall.figures
    ]
    if not rows:
        return None
    if len(rows) > MANY:
        rows.sort(key=lambda row: row[1].estimate or row[1].low, reverse=True)
    return Drawing(
        "forest", f"Speed-up over {summary.race['reference']}",
        "speed-ups with their intervals, as in the table of the race",
        (WIDTH, 0.75 + 0.5 * len(rows)), (12, 116, 8, 36), partial(_draw_forest, rows),
        "Filled: wall time. Hollow: CPU time. Bars are 95 % intervals; an arrowhead is a one-sided bound.",
    )  # fmt: skip


def _draw_forest(rows: list[tuple[Arm, SpeedUp, str]], axes: Axes, palette: Colours) -> list[Line]:
    ends = [1.0]
    for y, (arm, wall, variable) in enumerate(rows):
        colour = palette[variable if variable != "--other" else "--muted"]
        for found, offset, face in ((wall, 0.1, colour), (arm.cpu, 0.28, "none")):
            if found is None:
                continue
            mark, limits = "o", [value for value in (found.low, found.high) if 0 < value < math.inf]
            if found.method == "bound":
                mark = ">" if found.low > 0 else "<"
            else:
                width = 1.0 if face == "none" else 1.8
                axes.plot(limits, [y + offset] * len(limits), color=colour, linewidth=width)
            at = [found.estimate] if found.estimate else limits
            heights = [y + offset] * len(at)
            axes.plot(at, heights, mark, color=colour, markerfacecolor=face, markersize=6, zorder=3)
            ends += limits + at
        words = wall.figures.split(" (")[0]
        axes.annotate(words, (1, y + 0.1), (8, -3), ("axes fraction", "data"), "offset points")
    axes.axvline(1, color=palette["--ink"], linewidth=0.9)
    _ratios(axes, ends)
    _labelled(axes, [arm.label for arm, _, _ in rows], 54, palette)
    axes.set_xlabel("times sooner, logarithmic")
    return []


def cost_bars(summary: Summary) -> Drawing | None:
    """What each speed-up is the product of, with the memory that it takes."""
    found = costs(summary)
    rows = [
        (arm, found[arm.name], colour)
        for arm, colour in zip(summary.arms, colours(summary))
        if arm.name in found and arm.name != summary.race.get("control")
    ]
    if not rows:
        return None
    if len(rows) > MANY:
        rows.sort(key=lambda row: row[1].total, reverse=True)
    bars = 3 if any(cost.overhead != 1 for _, cost, _ in rows) else 2
    return Drawing(
        "costs", f"What the speed-ups over {summary.race['reference']} are made of",
        "fewer steps times cheaper steps times less compiling, as in the table of costs",
        (WIDTH, 0.75 + (0.32 + 0.14 * bars) * len(rows)), (12, 116, 8, 36),
        partial(_draw_costs, rows, bars, _memory(summary)),
        "Dark: fewer steps. Pale: cheaper steps. Hollow: less compiling, where there is any. Diamond: their "
        "product. Beside them, peak memory.",
    )  # fmt: skip


def _memory(summary: Summary) -> int | None:
    return next((arm.memory for arm in summary.arms if arm.name == summary.race["reference"]), None)


def _draw_costs(
    rows: list[tuple[Arm, Cost, str]], bars: int, memory: int | None, axes: Axes, palette: Colours
) -> list[Line]:
    ends = [1.0]
    for y, (arm, cost, variable) in enumerate(rows):
        colour = palette[variable if variable != "--other" else "--muted"]
        for index, value in enumerate(cost[:bars]):
            alpha, face = (0.9, 0.4, 1.0)[index], "none" if index == 2 else colour
            height = y - 0.08 + 0.2 * index
            axes.barh(
                height, value - 1, 0.17, left=1, facecolor=face, edgecolor=colour, linewidth=0.7, alpha=alpha
            )
            ends.append(value)
        axes.plot([cost.total], [y - 0.08 + 0.1 * (bars - 1)], "D", color=palette["--ink"], markersize=4)
        ends.append(cost.total)
        if arm.memory:
            times = f", {figure(arm.memory / memory)}x" if memory else ""
            axes.annotate(
                size(arm.memory) + times, (1, y), (8, -6), ("axes fraction", "data"), "offset points"
            )
    axes.axvline(1, color=palette["--ink"], linewidth=0.9)
    _ratios(axes, ends)
    _labelled(axes, [arm.label for arm, _, _ in rows], 54, palette)
    axes.set_xlabel("times better, logarithmic")
    return []


def frontier(summary: Summary) -> Drawing | None:
    """Cost against quality at the end, the frontier joined."""
    found = places(summary)
    if not found:
        return None
    unit = "seconds" if summary.timed else "steps"
    return Drawing(
        "frontier", f"Cost and final {summary.race['metric']}",
        "mean cost and mean quality of each arm, as in the table below",
        (WIDTH, 3.2), (56, 42, 14, 40), partial(_draw_frontier, summary, found, unit),
        "Filled: no other is both cheaper and better. Hollow: some other is. The number is the probability of "
        "the former over the seeds.",
    )  # fmt: skip


def _draw_frontier(
    summary: Summary, found: dict[str, quality.Place], unit: str, axes: Axes, palette: Colours
) -> list[Line]:
    falls = summary.race["falls"]
    edge = sorted((place for place in found.values() if place.on_frontier), key=lambda place: place.cost)
    axes.step(
        [place.cost for place in edge],
        [place.quality for place in edge],
        where="post",
        color=palette["--muted"],
        linewidth=0.9,
    )
    for arm, variable in zip(summary.arms, colours(summary)):
        if arm.name not in found:
            continue
        place = found[arm.name]
        colour = palette[variable if variable != "--other" else "--muted"]
        face = colour if place.on_frontier else palette["--paper"]
        axes.plot([place.cost], [place.quality], "o", color=colour, markerfacecolor=face, markersize=7)
        if place.on_frontier or len(found) <= MANY:
            at = (place.cost, place.quality)
            axes.annotate(f"{place.probability:.2f}", at, (7, 3 if falls else -10), "data", "offset points")
    _logarithmic(axes, "{:g}")
    axes.margins(0.12, 0.15)
    axes.set_xlabel(f"{unit} of training, logarithmic")
    axes.set_ylabel(f"final {summary.race['metric']}")
    return []


# ---- axes


def _labelled(axes: Axes, labels: list[str], most: int, palette: Colours) -> None:
    """A label above each row, where a long one has room."""
    behind = {"facecolor": palette["--paper"], "edgecolor": "none", "pad": 1}
    for y, label in enumerate(labels):
        text = label if len(label) <= most else label[: most - 1] + "…"
        place = axes.annotate(
            text, (0, y - 0.3), (0, 0), ("axes fraction", "data"), "offset points", fontsize=9.5
        )
        place.set_bbox(behind)
    axes.set_yticks([])
    axes.set_ylim(len(labels) - 0.5, -0.62)
    axes.spines["left"].set_visible(False)


def _ratios(axes: Axes, ends: list[float]) -> None:
    """A logarithmic axis of ratios around these ends."""
    low, high = min(ends), max(ends)
    spread = high / low
    axes.set_xlim(low / spread**0.08 / 1.02, high * spread**0.08 * 1.02)
    _logarithmic(axes, "{:g}x")


def _logarithmic(axes: Axes, text: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.xaxis.set_major_locator(MaxNLocator(4) if high / low < 4 else LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text.format(float(f"{value:.4g}"))))
    axes.xaxis.set_minor_formatter(NullFormatter())
