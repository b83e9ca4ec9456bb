"""Speed-up and efficiency over the number of GPUs, a curve for each way of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from soonest.core.forecast.predict import SOONEST, Row
from soonest.report.colours import INK, Rgb, of_place
from soonest.report.curves import spread
from soonest.writing import replaced

_DPI = 160
_WIDTH_IN, _HEIGHT_IN = 11.0, 5.2
_LEFT_IN, _BETWEEN_IN, _RIGHT_IN, _ABOVE_IN, _BELOW_IN = 0.8, 0.85, 1.25, 1.25, 0.72
_LABEL_IN = 0.18
_MOST_TICKS = 7
_FAINT, _GRID = "#7d858f", "#eceef1"
_COLOURS: dict[str, Rgb] = {
    "sequential": (0.6, 0.63, 0.67),
    "ddp": of_place(0.72),
    "ddp-tuned": of_place(0.5),
    "fsdp2": of_place(0.25),
    SOONEST: (0.84, 0.19, 0.15),
}
_BOUND = "bound"

Value = Callable[[Row, float], float]


def draw(rows: Sequence[Row], path: str | Path, *, title: str) -> Path:
    """Draws speed-up on logarithmic axes, and efficiency beside it, as a PNG.

    The grey area is what no schedule can reach.

    Args:
        rows: at least two, ascending, all with the same ways of training.
        path: of the file to write; its folder is made if it is missing.
        title: above the picture.

    Returns:
        The path.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError("nothing to draw: a curve needs two numbers of hosts or more")
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for text, down_in, look in (
        (title, 0.24, {"size": 13, "weight": "bold", "color": INK}),
        ("Predicted by simulation. Grey: beyond what any schedule can reach on this network.",
         0.52, {"size": 9, "color": _FAINT}),
    ):  # fmt: skip
        x, y = 0.25 / _WIDTH_IN, 1 - down_in / _HEIGHT_IN
        figure.text(x, y, text, va="top", **look)
    wide = (_WIDTH_IN - _LEFT_IN - _BETWEEN_IN - _RIGHT_IN) / 2
    tall = (_HEIGHT_IN - _ABOVE_IN - _BELOW_IN) / _HEIGHT_IN
    lefts = (_LEFT_IN, _LEFT_IN + wide + _BETWEEN_IN)
    left, right = (
        figure.add_axes((x / _WIDTH_IN, _BELOW_IN / _HEIGHT_IN, wide / _WIDTH_IN, tall))
        for x in lefts
    )
    _frame(left, rows, "Speed-up over one GPU alone")
    _speedups(left, rows)
    _frame(right, rows, "Efficiency: speed-up per GPU")
    _efficiencies(right, rows)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as new:
        figure.savefig(new, dpi=_DPI, format="png")
    return path


def _frame(axes: Axes, rows: Sequence[Row], title: str) -> None:
    gpus = [row.gpus for row in rows]
    axes.set_title(title, size=10, loc="left", pad=9, color=INK, weight="bold")
    axes.set_xscale("log", base=2)
    axes.set_xlim(gpus[0], gpus[-1])
    every = -(-len(gpus) // _MOST_TICKS)
    shown = sorted({*gpus[::-1][::every]}) if every > 1 else gpus
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlabel("GPUs", size=9.5, color=INK, labelpad=6)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_FAINT, labelcolor=INK, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def _speedups(axes: Axes, rows: Sequence[Row]) -> None:
    values = [row.speedup(s) for row in rows for s in (*row.step_s.values(), row.bound_s)]
    axes.set_yscale("log", base=2)
    low, high = min(1.0, *values), max(1.3 * max(values), 2.0)
    axes.set_ylim(low, high)
    ticks = [2**power for power in range(14) if low <= 2**power <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // _MOST_TICKS)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    _curves(axes, rows, Row.speedup, high)


def _efficiencies(axes: Axes, rows: Sequence[Row]) -> None:
    most = max(row.efficiency(s) for row in rows for s in (*row.step_s.values(), row.bound_s))
    axes.set_ylim(0.0, 1.06 * max(1.0, most))
    axes.yaxis.set_major_locator(FixedLocator([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _curves(axes, rows, Row.efficiency, axes.get_ylim()[1])
    _names(axes, rows)


def _curves(axes: Axes, rows: Sequence[Row], value: Value, top: float) -> None:
    gpus = [row.gpus for row in rows]
    bound = [value(row, row.bound_s) for row in rows]
    axes.fill_between(gpus, bound, top, color=_GRID, linewidth=0, zorder=1)
    axes.plot(gpus, bound, color=INK, linewidth=1.1, linestyle=(0, (3, 2)), zorder=3)
    for arm in rows[0].step_s:
        bold = arm == SOONEST
        axes.plot(
            gpus, [value(row, row.step_s[arm]) for row in rows], color=_COLOURS[arm],
            linewidth=2.6 if bold else 1.3, marker="o", markersize=4.5 if bold else 3,
            zorder=5 if bold else 4, clip_on=False,
        )  # fmt: skip


def _names(axes: Axes, rows: Sequence[Row]) -> None:
    """Each curve's name at its end, moved apart where ends are close."""
    row = rows[-1]
    ends = {arm: row.efficiency(s) for arm, s in (row.step_s | {_BOUND: row.bound_s}).items()}
    # Names that end at the same height stand in the order of the curves.
    order = sorted(ends, key=lambda arm: ends[arm])
    pixels = [float(axes.transData.transform((row.gpus, ends[arm]))[1]) for arm in order]
    for arm, height in zip(order, spread(pixels, _LABEL_IN * _DPI), strict=True):
        _, y = axes.transData.inverted().transform((0, height))
        figure = axes.get_figure(root=True)
        assert figure is not None
        aside = axes.transData + ScaledTranslation(0.28, 0, figure.dpi_scale_trans)
        near = axes.transData + ScaledTranslation(0.06, 0, figure.dpi_scale_trans)
        far = axes.transData + ScaledTranslation(0.24, 0, figure.dpi_scale_trans)
        colour: Any = _COLOURS.get(arm, INK)
        tip = near.transform((row.gpus, ends[arm])), far.transform((row.gpus, y))
        (x0, y0), (x1, y1) = (axes.transData.inverted().transform(point) for point in tip)
        axes.plot([x0, x1], [y0, y1], color=_FAINT, linewidth=0.6, clip_on=False)
        axes.text(
            row.gpus, y, arm, transform=aside, size=9, va="center", color=colour,
            weight="bold" if arm == SOONEST else "normal",
        )  # fmt: skip
