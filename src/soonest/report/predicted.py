"""Predicted against measured step times, one point for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from soonest.report.colours import INK, of_place

_DPI = 160
_SIZE_IN = (7.2, 6.6)
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
    axes = figure.add_axes((0.11, 0.1, 0.84, 0.78))
    times = [ms for pair in pairs for ms in (pair.measured_ms, pair.predicted_ms)]
    ends = [min(times) / 1.3, max(times) * 1.3]
    for share, shade in ((_FAR, "#f3f4f6"), (_NEAR, "#e3e6ea")):
        low, high = [[ms * (1 + sign * share) for ms in ends] for sign in (-1, 1)]
        axes.fill_between(ends, low, high, color=shade, linewidth=0, zorder=1)
        axes.text(
            ends[1] / 1.03, ends[1] / 1.03 * (1 - share), f"{share:.0%}", size=7.5, color=_FAINT,
            ha="right", va="top", zorder=2,
        )  # fmt: skip
    axes.plot(ends, ends, color=INK, linewidth=0.9, zorder=2)
    arms = list(dict.fromkeys(pair.arm for pair in pairs))
    for place, arm in enumerate(arms):
        mine = [pair for pair in pairs if pair.arm == arm]
        axes.scatter(
            [pair.measured_ms for pair in mine],
            [pair.predicted_ms for pair in mine],
            s=26,
            marker=_MARKS[place % len(_MARKS)],
            color=[of_place(0.1 + 0.75 * place / max(1, len(arms) - 1))],
            edgecolor="white",
            linewidth=0.6,
            label=arm,
            zorder=3,
        )
    for axis, which in ((axes.xaxis, "measured"), (axes.yaxis, "predicted")):
        axis.set_label_text(f"{which} step, ms", size=9.5, color=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(ends[0], ends[1])
    axes.set_ylim(ends[0], ends[1])
    axes.grid(color=_GRID, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=_FAINT, length=2)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", handletextpad=0.3)
    figure.text(
        0.03, 0.955, "Step times, predicted and measured", size=13, weight="bold", color=INK
    )
    figure.text(
        0.03, 0.92, f"{len(pairs)} steps on emulated hosts; bands: off by up to 4 and 12 %",
        size=9, color=_FAINT,
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, format="png")
    return path
