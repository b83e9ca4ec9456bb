"""Cost by size as curves, one for each method, and where which is the cheapest."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from soonest.core.units import size_text
from soonest.report.colours import INK, Rgb, of_place
from soonest.writing import replaced

_DPI = 160
_WIDTH_IN, _HEIGHT_IN = 9.0, 6.0
_LEFT_IN, _RIGHT_IN, _ABOVE_IN, _BELOW_IN = 0.85, 1.35, 1.5, 0.72
_LABEL_IN = 0.19
"""Least distance of labels above each other."""
_STRIP_IN = 0.07
_FAINT, _GRID = "#7d858f", "#eceef1"
_OTHER: Rgb = to_rgb("#a7afb9")
"""Of methods that are nowhere the cheapest."""

Point = tuple[float, float]
"""Bytes and seconds."""


@dataclass(frozen=True)
class Run:
    """A range of sizes with the same cheapest method.

    Args:
        method: its name.
        start_bytes, stop_bytes: of the range.
        note: what to say of it, in a few words.
    """

    method: str
    start_bytes: float
    stop_bytes: float
    note: str


@dataclass(frozen=True)
class Chart:
    """What to draw.

    Args:
        title: above it.
        points: by method, ascending in size, two or more of each.
        runs: ascending; each begins where the one before ends.
        baseline: the method that the others are compared with.
        dashed: methods that are not to choose from.
        why_dashed: why they are not, in a few words.
    """

    title: str
    points: Mapping[str, Sequence[Point]]
    runs: Sequence[Run]
    baseline: str
    dashed: Collection[str] = ()
    why_dashed: str = ""


def draw(chart: Chart, path: str | Path) -> Path:
    """Draws the curves on logarithmic axes as a PNG.

    The line of a method is bold where that is the cheapest to choose, and grey if it never is.

    Args:
        chart: what to draw.
        path: of the file to write; its folder is made if it is missing.

    Returns:
        The path.

    Raises:
        ValueError: there is no curve.
    """
    if not chart.points or not chart.runs:
        raise ValueError("nothing to draw: give at least one curve and one run")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as new:
        _figure(chart).savefig(new, dpi=_DPI, format="png")
    return path


def _figure(chart: Chart) -> Figure:
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    box = (
        _LEFT_IN / _WIDTH_IN,
        _BELOW_IN / _HEIGHT_IN,
        1 - (_LEFT_IN + _RIGHT_IN) / _WIDTH_IN,
        1 - (_ABOVE_IN + _BELOW_IN) / _HEIGHT_IN,
    )
    axes = figure.add_axes(box)
    lines = [f"Bold: the cheapest for each size, and how many times as fast as {chart.baseline}."]
    if chart.dashed:
        lines.append(f"Dashed: {chart.why_dashed}.")
    for text, down_in, look in (
        (chart.title, 0.24, {"size": 13, "weight": "bold", "color": INK}),
        ("\n".join(lines), 0.52, {"size": 9, "color": _FAINT, "linespacing": 1.4}),
    ):
        x, y = 0.25 / _WIDTH_IN, 1 - down_in / _HEIGHT_IN
        figure.text(x, y, text, va="top", **look)
    _scales(axes, chart)
    colours = _colours(chart)
    for method, points in chart.points.items():
        _curve(axes, points, colours[method], dashed=method in chart.dashed)
    for run in chart.runs:
        _run(axes, chart, run, colours[run.method])
    for run in chart.runs[1:]:
        _crossover(axes, chart, run)
    _names(axes, chart, colours)
    return figure


def _colours(chart: Chart) -> dict[str, Rgb]:
    """Even steps for those that are the cheapest somewhere; ink for the baseline."""
    cheapest = [m for m in chart.points if m in {run.method for run in chart.runs}]
    coloured = [method for method in cheapest if method != chart.baseline]
    steps = max(1, len(coloured) - 1)
    shades = {method: of_place(0.2 + 0.5 * at / steps) for at, method in enumerate(coloured)}
    return dict.fromkeys(chart.points, _OTHER) | shades | {chart.baseline: INK}


def _scales(axes: Axes, chart: Chart) -> None:
    sizes = sorted({size for points in chart.points.values() for size, _ in points})
    seconds = [second for points in chart.points.values() for _, second in points]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_ylim(min(seconds) / 1.8, max(seconds) * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=30))
    for axis, text in ((axes.xaxis, size_text), (axes.yaxis, _seconds)):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, labelcolor=INK, labelsize=9, length=0)
    axes.set_xlabel("size of the tensor", size=9.5, color=INK, labelpad=6)
    axes.set_ylabel("time to reduce it", size=9.5, color=INK, labelpad=4)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def _curve(axes: Axes, points: Sequence[Point], colour: Rgb, *, dashed: bool) -> None:
    axes.plot(
        *zip(*points, strict=True), color=colour, linewidth=1.2, marker="o", markersize=3.2,
        linestyle=(0, (4, 1.6)) if dashed else "solid", zorder=2 if colour == _OTHER else 3,
        clip_on=False,
    )  # fmt: skip


def _run(axes: Axes, chart: Chart, run: Run, colour: Rgb) -> None:
    """The part of a curve where it is the lowest, and its name above."""
    points = chart.points[run.method]
    inner = [point for point in points if run.start_bytes < point[0] < run.stop_bytes]
    ends = [(size, _at(points, size)) for size in (run.start_bytes, run.stop_bytes)]
    bold = [ends[0], *inner, ends[1]]
    axes.plot(
        *zip(*bold, strict=True), color=colour, linewidth=4.2, zorder=4, clip_on=False,
        solid_capstyle="butt",
    )  # fmt: skip
    above = axes.get_xaxis_transform()
    axes.plot(
        [run.start_bytes, run.stop_bytes], [1, 1], color=colour, linewidth=72 * _STRIP_IN,
        transform=above, clip_on=False, solid_capstyle="butt", zorder=1,
    )  # fmt: skip
    middle = math.sqrt(run.start_bytes * run.stop_bytes)
    room = abs(_x_px(axes, run.stop_bytes) - _x_px(axes, run.start_bytes))
    for text, up_in, look in (
        (run.method, 0.27, {"size": 10, "weight": "bold", "color": colour}),
        (run.note, 0.1, {"size": 8.5, "color": INK}),
    ):
        label = axes.text(
            middle, 1, text, transform=above + _offset(axes, 0, up_in), ha="center", **look
        )
        if label.get_window_extent().width > room:
            label.remove()


def _crossover(axes: Axes, chart: Chart, run: Run) -> None:
    """Where a run begins, down to the axis, with its size."""
    size = run.start_bytes
    axes.axvline(size, color=_FAINT, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
    axes.plot(
        [size], [_at(chart.points[run.method], size)], marker="o", markersize=7, zorder=5,
        markerfacecolor="white", markeredgecolor=INK, markeredgewidth=1.4,
    )  # fmt: skip
    axes.text(
        size, 0, size_text(size), transform=axes.get_xaxis_transform() + _offset(axes, 0.05, 0.08),
        size=8.5, color=INK,
    )  # fmt: skip


def _names(axes: Axes, chart: Chart, colours: Mapping[str, Rgb]) -> None:
    """Each curve's name at its end; where ends are close, names are moved apart."""
    ends = {method: points[-1] for method, points in chart.points.items()}
    pixels = {method: float(axes.transData.transform(end)[1]) for method, end in ends.items()}
    apart = dict(zip(pixels, spread(list(pixels.values()), _LABEL_IN * _DPI), strict=True))
    right = _x_px(axes, axes.get_xlim()[1])
    for method, (size, seconds) in ends.items():
        colour = colours[method]
        look: dict[str, Any] = {"color": _FAINT} if colour == _OTHER else {"color": colour}
        to_x, to_y = axes.transData.inverted().transform((right + 0.3 * _DPI, apart[method]))
        axes.plot(
            [size, to_x], [seconds, to_y], color=_OTHER, linewidth=0.6, clip_on=False, zorder=1
        )
        bold = "bold" if method in {run.method for run in chart.runs} else "normal"
        axes.text(
            to_x, to_y, method, transform=axes.transData + _offset(axes, 0.05, 0),
            size=9, va="center", weight=bold, **look,
        )  # fmt: skip


def spread(places: Sequence[float], least: float) -> list[float]:
    """Moves places apart until all are ``least`` from each other, in their order, and not far."""
    order = sorted(range(len(places)), key=places.__getitem__)
    blocks: list[list[int]] = [[index] for index in order]

    def low(block: list[int]) -> float:
        centre = sum(places[index] for index in block) / len(block)
        return centre - least * (len(block) - 1) / 2

    at = 0
    while at < len(blocks) - 1:
        one, other = blocks[at], blocks[at + 1]
        if low(other) - low(one) < least * len(one):
            blocks[at : at + 2] = [one + other]
            at = max(0, at - 1)
        else:
            at += 1
    found = [0.0] * len(places)
    for block in blocks:
        for place, index in enumerate(block):
            found[index] = low(block) + least * place
    return found


def _at(points: Sequence[Point], size: float) -> float:
    """Seconds on the line between the points, straight on logarithmic axes."""
    right = min(max(1, bisect_left([s for s, _ in points], size)), len(points) - 1)
    (s0, t0), (s1, t1) = points[right - 1], points[right]
    return t0 * (t1 / t0) ** (math.log(size / s0) / math.log(s1 / s0))


def _x_px(axes: Axes, size: float) -> float:
    return float(axes.transData.transform((size, 1.0))[0])


def _offset(axes: Axes, right_in: float, up_in: float) -> ScaledTranslation:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return ScaledTranslation(right_in, up_in, figure.dpi_scale_trans)


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 0.999:
            return f"{value * factor:g} {unit}"
    return f"{value * 1e9:g} ns"
