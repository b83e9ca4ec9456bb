"""Steps of training as a picture: what waits for what."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import ScaledTranslation

from soonest.core.timeline import Kind, Span, Timeline, Track
from soonest.report.colours import GREY, INK, RED, Rgb, contrast, of_place
from soonest.report.urgency import Urgency, in_turn
from soonest.writing import replaced

_DPI = 160
_WIDTH_IN = 12.0
_ABOVE_IN, _BLOCK_IN, _BELOW_IN = 0.62, 1.95, 1.0
_LEFT_IN, _RIGHT_IN = 1.0, 1.68
_LANES: dict[Track, tuple[float, float]] = {
    "compute": (0.52, 0.5),
    "network": (1.08, 0.5),
    "update": (1.64, 0.14),
}
"""Top and height of each lane, inches below the top of its block."""

_FAINT, _LANE = "#7d858f", "#f1f3f5"
_UPDATE: Rgb = (0.29, 0.31, 0.34)
_WAIT_HATCH = "#e8998d"

_ENOUGH, _SOME = 0.6, 0.3
"""Share of a lane, by time, that names must fit to be shown: if shorter ones are left, if not."""
_NOTE_WIDTH = 130
"""Characters in a line of what is noted beside the title."""
_TOUCH = 0.003
"""Spans are neighbours if the gap between them is below this share of the step."""


def draw(
    timelines: Sequence[Timeline], path: str | Path, *, title: str = "What waits for what"
) -> Path:
    """Draws one or several steps under each other, on a common time axis, as a PNG.

    A layer has the same colour wherever it appears: dark if the forward pass needs it first, bright
    if last. So the order of the colours on the network is the order of urgency.

    Args:
        timelines: at least one.
        path: of the file to write; its folder is made if it is missing.
        title: above the whole picture.

    Returns:
        The path.

    Raises:
        ValueError: there is no timeline.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as new:
        figure_of(timelines, title=title).savefig(new, dpi=_DPI, format="png")
    return path


def figure_of(timelines: Sequence[Timeline], *, title: str) -> Figure:
    """The picture as a figure; see ``draw``."""
    if not timelines:
        raise ValueError("nothing to draw: give at least one timeline")
    height = _ABOVE_IN + _BLOCK_IN * len(timelines) + _BELOW_IN
    figure = Figure(figsize=(_WIDTH_IN, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (
            _LEFT_IN / _WIDTH_IN,
            _BELOW_IN / height,
            1 - (_LEFT_IN + _RIGHT_IN) / _WIDTH_IN,
            _BLOCK_IN * len(timelines) / height,
        ),
        facecolor="none",
    )
    longest_s = max(timeline.step_s for timeline in timelines)
    axes.set_xlim(0, longest_s * 1e3)
    axes.set_ylim(_BLOCK_IN * len(timelines), 0)
    _time_axis(axes)
    figure.text(
        0.2 / _WIDTH_IN, 1 - 0.32 / height, title, size=15, weight="bold", color=INK, va="center"
    )
    for index, timeline in enumerate(timelines):
        _Block(axes, timeline, top=index * _BLOCK_IN).draw(longest_s)
    _legend(figure, timelines, height)
    return figure


class _Block:
    """One timeline within the picture.

    Args:
        axes: milliseconds to the right, inches downwards.
        timeline: the step.
        top: of the block, inches.
    """

    def __init__(self, axes: Axes, timeline: Timeline, *, top: float) -> None:
        self.axes = axes
        self.timeline = timeline
        self.urgency = Urgency(timeline)
        self.top = top

    def draw(self, longest_s: float) -> None:
        left = self.axes.get_yaxis_transform()
        inch = 1 / (_WIDTH_IN - _LEFT_IN - _RIGHT_IN)
        self.axes.text(
            -0.8 * inch, self.top + 0.2, self.timeline.title,
            transform=left, size=12, weight="bold", color=INK, va="center",
        )  # fmt: skip
        self.axes.text(
            0.5 * inch, self.top + 0.2, textwrap.fill(self.timeline.note, _NOTE_WIDTH),
            transform=left, size=7.5, color=_FAINT, va="center",
        )  # fmt: skip
        for track, (offset, height) in _LANES.items():
            self._box(0.0, self.timeline.step_s, self.top + offset, height, facecolor=_LANE)
            self.axes.text(
                -0.1 * inch, self.top + offset + height / 2, track,
                transform=left, size=10, color=INK, ha="right", va="center",
            )  # fmt: skip
            self._lane(track, self.top + offset, height)
        self._phases()
        self._end(longest_s)

    def _lane(self, track: Track, top: float, height: float) -> None:
        spans = in_turn(span for span in self.timeline.spans if span.track == track)
        for span in spans:
            self._span(span, top, height)
        if track != "update":
            self._name(spans, top + height / 2)

    def _span(self, span: Span, top: float, height: float) -> None:
        """A box; that of a bucket has a band for every layer it carries."""
        if span.kind == "wait":
            look = {"facecolor": RED, "edgecolor": _WAIT_HATCH, "hatch": "/////"}
            self._box(span.start_s, span.end_s, top, height, **look)
            return
        layers = self.urgency.layers_of(span)
        shades = [_shade(self.urgency.place(layer), span.kind) for layer in layers]
        if span.kind in ("update", "other") or not shades:
            shades = [_UPDATE if span.kind == "update" else GREY]
        each = height / len(shades)
        for index, shade in enumerate(shades):
            self._box(span.start_s, span.end_s, top + index * each, each, facecolor=shade)
        if span.track != "update":
            outline = {"facecolor": "none", "edgecolor": "white", "linewidth": 0.4}
            self._box(span.start_s, span.end_s, top, height, **outline)

    def _box(self, start_s: float, end_s: float, top: float, height: float, **look: Any) -> None:
        corner, width = (start_s * 1e3, top), (end_s - start_s) * 1e3
        self.axes.add_patch(Rectangle(corner, width, height, **{"linewidth": 0, **look}))

    def _name(self, spans: Sequence[Span], y: float) -> None:
        """Labels spans with their layers, or runs of spans with what these have in common."""
        deepest = max((layer.count(".") + 1 for layer in self.urgency.layers), default=1)
        busy_s = sum(span.end_s - span.start_s for span in spans if span.kind != "wait")
        for depth in range(max(deepest, 2), 1, -1):
            labels: list[Text] = []
            named_s = 0.0
            for label, run in self._runs(spans, depth):
                if text := self._fit(label, run, y):
                    labels.append(text)
                    named_s += run[-1].end_s - run[0].start_s
            if named_s >= (_ENOUGH if depth > 2 else _SOME) * busy_s:
                return
            for text in labels:
                text.remove()

    def _runs(self, spans: Sequence[Span], depth: int) -> Iterator[tuple[str, list[Span]]]:
        """Spans that touch and have the same label, with that."""
        run: list[Span] = []
        for span in spans:
            touches = run and span.start_s - run[-1].end_s < _TOUCH * self.timeline.step_s
            if touches and self._label(span, depth) == self._label(run[0], depth):
                run.append(span)
                continue
            if run:
                yield self._label(run[0], depth)[-1], run
            run = [] if span.kind == "wait" else [span]
        if run:
            yield self._label(run[0], depth)[-1], run

    def _label(self, span: Span, depth: int) -> tuple[str, ...]:
        """What to call a span, last, and before that what else tells it from its neighbours."""
        layers = self.urgency.layers_of(span)
        common = {".".join(layer.split(".")[:depth]) for layer in layers}
        if len(common) == 1:
            return (span.kind, *common)
        return (span.kind, span.name, f"{len(layers)} layers" if layers else span.name)

    def _fit(self, label: str, run: Sequence[Span], y: float) -> Text | None:
        """The label, if it fits over the run."""
        start, end = run[0].start_s * 1e3, run[-1].end_s * 1e3
        layers = self.urgency.layers_of(run[len(run) // 2])
        middle = self.urgency.place(layers[len(layers) // 2]) if layers else None
        behind = GREY if middle is None else _shade(middle, run[0].kind)
        text = self.axes.text(
            (start + end) / 2, y, label, size=8.5, ha="center", va="center",
            color=contrast(behind),
        )  # fmt: skip
        extent = text.get_window_extent().transformed(self.axes.transData.inverted())
        if extent.width < 0.92 * (end - start):
            return text
        text.remove()
        return None

    def _phases(self) -> None:
        """Names the passes above the compute lane."""
        y = self.top + _LANES["compute"][0] - 0.09
        for kind in ("backward", "forward"):
            spans = self.timeline.of(kind)
            if spans:
                start, end = spans[0].start_s * 1e3, max(span.end_s for span in spans) * 1e3
                self.axes.plot([start, end], [y, y], color=_FAINT, linewidth=0.8)
                self.axes.text(
                    (start + end) / 2, y, kind, size=8.5, color=_FAINT, ha="center", va="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 2.0},
                )  # fmt: skip

    def _end(self, longest_s: float) -> None:
        """Marks the end of the step with its length and what was hidden."""
        x = self.timeline.step_s * 1e3
        top = self.top + _LANES["compute"][0] - 0.16
        bottom = self.top + sum(_LANES["update"])
        self.axes.plot([x, x], [top, bottom], color=INK, linewidth=1.4, clip_on=False)
        lines = [f"{self.timeline.hidden_share:.0%} of the sending", "hidden behind compute"]
        if self.timeline.step_s < longest_s:
            lines.insert(0, f"{longest_s / self.timeline.step_s:.2f} times as fast")
        shift = self.axes.transData + _offset(self.axes, 0.1)
        self.axes.text(
            x, top + 0.28, f"{x:.3g} ms" if x < 1000 else f"{x:.0f} ms",
            transform=shift, size=15, weight="bold", color=INK, va="center",
        )  # fmt: skip
        self.axes.text(
            x, top + 0.48, "\n".join(lines), transform=shift, size=8.5, color=_FAINT, va="top",
            linespacing=1.35,
        )  # fmt: skip


def _shade(place: float, kind: Kind) -> Rgb:
    return of_place(place, pale=kind == "backward")


def _offset(axes: Axes, inches: float) -> ScaledTranslation:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return ScaledTranslation(inches, 0, figure.dpi_scale_trans)


def _time_axis(axes: Axes) -> None:
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.set_yticks([])
    axes.tick_params(axis="x", colors=_FAINT, labelcolor=INK, labelsize=9, length=3)
    axes.set_xlabel("ms since the backward pass began", size=9, color=INK, labelpad=3)


def _legend(figure: Figure, timelines: Sequence[Timeline], height: float) -> None:
    shades = [0.0, 0.25, 0.5, 0.75, 1.0]

    def strip(kind: Kind) -> tuple[Patch, ...]:
        return tuple(Patch(facecolor=_shade(shade, kind)) for shade in shades)

    entries: list[tuple[Any, str]] = [
        (strip("forward"), "layers, from the first that the forward pass needs to the last"),
        (strip("backward"), "the same, backward pass"),
        (Patch(facecolor=_UPDATE), "optimizer"),
    ]
    if any(timeline.of("wait") for timeline in timelines):
        waiting = Patch(facecolor=RED, edgecolor=_WAIT_HATCH, hatch="/////", linewidth=0)
        entries.insert(2, (waiting, "compute waits for the network"))
    figure.legend(
        [handle for handle, _ in entries],
        [label for _, label in entries],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower left", bbox_to_anchor=(0.14 / _WIDTH_IN, 0.1 / height), ncols=len(entries),
        frameon=False, fontsize=9, labelcolor=INK, handlelength=3.2, columnspacing=2.0,
    )  # fmt: skip
