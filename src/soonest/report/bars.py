"""Step times as bars: one panel for each comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from soonest.report.colours import GREY, INK, of_place
from soonest.writing import replaced

_DPI = 160
_PANEL_IN = 4.4
_BAR_IN, _HEAD_IN, _FOOT_IN = 0.26, 0.42, 0.42
_TITLE_IN = 0.75
_HIGHLIGHT = of_place(0.45)
_FAINT = "#7d858f"


@dataclass(frozen=True)
class Panel:
    """One comparison.

    Args:
        title: above it.
        bound_ms: what no arm can beat.
        step_ms: by arm, the one on top first.
        highlight: the arm that stands out.
    """

    title: str
    bound_ms: float
    step_ms: dict[str, float]
    highlight: str = "soonest"


def draw(
    panels: Sequence[Panel], path: str | Path, *, title: str = "Time of a training step"
) -> Path:
    """Draws bars of one or many comparisons as a PNG.

    Args:
        panels: at least one; more than one are set in three columns at most.
        path: of the file to write; its folder is made if it is missing.
        title: above the whole picture.

    Returns:
        The path.

    Raises:
        ValueError: there is no panel.
    """
    if not panels:
        raise ValueError("nothing to draw: give at least one comparison")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    most = max(len(panel.step_ms) for panel in panels)
    panel_in = _HEAD_IN + _BAR_IN * most + _FOOT_IN
    width, height = max(7.0, _PANEL_IN * columns), _TITLE_IN + panel_in * rows
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.25 / width, 1 - 0.3 / height, title, size=13, weight="bold", color=INK, va="top")
    left, right = 1.25, 0.25
    cell = width / columns
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        top = height - _TITLE_IN - row * panel_in - _HEAD_IN
        tall = _BAR_IN * len(panel.step_ms)
        box = (column * cell + left, top - tall, cell - left - right, tall)
        axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
        _panel(axes, panel)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as new:
        figure.savefig(new, dpi=_DPI, format="png")
    return path


def _panel(axes: Axes, panel: Panel) -> None:
    arms, times = list(panel.step_ms), list(panel.step_ms.values())
    longest = max(*times, panel.bound_ms)
    colours = [_HIGHLIGHT if arm == panel.highlight else GREY for arm in arms]
    axes.barh(range(len(arms)), times, height=0.72, color=colours)
    axes.axvline(panel.bound_ms, color=INK, linewidth=1.1, linestyle=(0, (3, 2)))
    axes.text(panel.bound_ms, -0.58, "bound", size=7, color=INK, ha="center", va="bottom")
    for place, ms in enumerate(times):
        share = f"{ms:.1f} ms · {ms / panel.bound_ms:.2f}×"
        axes.text(ms + 0.015 * longest, place, share, size=7.5, va="center", color=INK)
    axes.set_yticks(range(len(arms)), arms, size=8.5)
    for label, arm in zip(axes.get_yticklabels(), arms, strict=True):
        label.set_fontweight("bold" if arm == panel.highlight else "normal")
    axes.set_ylim(len(arms) - 0.45, -0.55)
    axes.set_xlim(0, longest * 1.45)  # with room for the words behind the longest bar
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5, colors=_FAINT, length=2)
    axes.set_title(panel.title, size=9, loc="left", pad=13, color=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
