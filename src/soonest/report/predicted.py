"""Predicted against measured step times, one point for each, and by how much they are off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from soonest.report.colours import INK, of_place
from soonest.writing import replaced

_DPI = 160
_SIZE_IN = (7.2, 8.2)
_NEAR, _FAR = 0.04, 0.12
_FAINT, _GRID = "#7d858f", "#eceef1"
_MARKS = ("o", "s", "D", "^", "v", "P")


@dataclass(frozen=True)
class Pair:
    """One step time.

    Args:
        arm: the way of training.
        cell: what was trained where.
        measured_ms, predicted_ms: of a step.
    """

    arm: str
    cell: str
    measured_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured; below zero if it is too short."""
        return self.predicted_ms / self.measured_ms - 1


def draw(pairs: Sequence[Pair], path: str | Path) -> Path:
    """Draws a PNG.

    Args:
        pairs: at least one.
        path: of the file to write; its folder is made if it is missing.

    Returns:
        The path.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not pairs:
        raise ValueError("nothing to draw: give at least one step time")
    figure = Figure(figsize=_SIZE_IN, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    above = figure.add_axes((0.11, 0.36, 0.84, 0.53))
    below = figure.add_axes((0.11, 0.08, 0.84, 0.24))
    times = [ms for pair in pairs for ms in (pair.measured_ms, pair.predicted_ms)]
    ends = (min(times) / 1.15, max(times) * 1.15)
    most = max(_FAR * 1.25, *(abs(pair.error) * 1.1 for pair in pairs))
    for share, shade in ((_FAR, "#f3f4f6"), (_NEAR, "#e3e6ea")):
        above.fill_between(
            ends,
            [ms * (1 - share) for ms in ends],
            [ms * (1 + share) for ms in ends],
            color=shade,
            linewidth=0,
        )
        below.axhspan(-100 * share, 100 * share, color=shade, linewidth=0)
    above.plot(ends, ends, color=INK, linewidth=0.9)
    below.axhline(0, color=INK, linewidth=0.9)
    for place, arm in enumerate(dict.fromkeys(pair.arm for pair in pairs)):
        mine = [pair for pair in pairs if pair.arm == arm]
        measured = [pair.measured_ms for pair in mine]
        mark: dict[str, Any] = {
            "s": 30,
            "marker": _MARKS[place % len(_MARKS)],
            "color": [of_place(0.1 + 0.28 * (place % 4))],
            "edgecolor": "white",
            "linewidth": 0.6,
            "zorder": 3,
        }
        above.scatter(measured, [pair.predicted_ms for pair in mine], label=arm, **mark)
        below.scatter(measured, [100 * pair.error for pair in mine], **mark)
    above.set_yscale("log")
    _ticks(above.yaxis)
    above.set_ylim(*ends)
    above.set_ylabel("predicted step, ms", size=9.5, color=INK)
    above.legend(frameon=False, fontsize=9, loc="upper left", handletextpad=0.3)
    below.set_ylim(-100 * most, 100 * most)
    below.set_yticks([-100 * _FAR, -100 * _NEAR, 0, 100 * _NEAR, 100 * _FAR])
    below.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+.0f}%" if value else "0")
    )
    below.set_ylabel("off by", size=9.5, color=INK)
    below.set_xlabel("measured step, ms", size=9.5, color=INK)
    for axes in (above, below):
        axes.set_xscale("log")
        _ticks(axes.xaxis)
        axes.set_xlim(*ends)
        axes.grid(color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(which="major", labelsize=8.5, colors=_FAINT, length=0)
        axes.tick_params(which="minor", length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    figure.text(
        0.03, 0.955, "Step times, predicted and measured", size=13, weight="bold", color=INK
    )
    cells = len({pair.cell for pair in pairs})
    told = f"{len(pairs)} steps of {cells} comparisons on emulated hosts; bands: 4 and 12 %"
    figure.text(0.03, 0.922, told, size=9, color=_FAINT)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as new:
        figure.savefig(new, dpi=_DPI, format="png")
    return path


def _ticks(axis: Axis) -> None:
    """Round numbers at the ticks of a logarithmic axis."""
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
