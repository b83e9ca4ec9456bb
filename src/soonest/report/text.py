"""Steps of training as bars of text, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from soonest.core.timeline import Span, Timeline, Track
from soonest.report.colours import RED, Rgb, contrast, of_place
from soonest.report.urgency import Urgency, in_turn

if TYPE_CHECKING:
    from rich.text import Text

_TRACKS: tuple[Track, ...] = ("compute", "network", "update")
_LABEL = 10
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ROOM = 4
"""Cells that a bucket needs to show its first and its last layer."""
_WAIT, _BUSY, _END = "░", "█", "│"

LEGEND = (
    "Letters are layers, a is needed first. Compute: small letters are the backward pass, "
    f"capitals the forward pass, {_WAIT} waits for the network. "
    "Network: a---d is one bucket of layers a to d."
)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One character and the colour behind it, if any."""

    character: str = " "
    behind: Rgb | None = None


def bars(timelines: Sequence[Timeline], *, width: int = 100) -> str:
    """One or several steps as lines of text on a common time axis, with an explanation.

    Args:
        timelines: at least one.
        width: of the lines, in characters.

    Raises:
        ValueError: there is no timeline, or no room.
    """
    lines = ["".join(cell.character for cell in line).rstrip() for line in _lines(timelines, width)]
    return "\n".join([*lines, *textwrap.wrap(LEGEND, width)])


def coloured(timelines: Sequence[Timeline], *, width: int = 100) -> Text:
    """The same for a terminal: every layer in its colour, dark if it is needed first."""
    from rich.style import Style
    from rich.text import Text

    text = Text(no_wrap=True)
    for line in _lines(timelines, width):
        for cell in line:
            style = Style()
            if cell.behind is not None:
                style = Style(color=_hex(contrast(cell.behind)), bgcolor=_hex(cell.behind))
            text.append(cell.character, style)
        text.append("\n")
    return text.append("\n".join(textwrap.wrap(LEGEND, width)), "dim")


def _lines(timelines: Sequence[Timeline], width: int) -> list[list[_Cell]]:
    if not timelines:
        raise ValueError("nothing to show: give at least one timeline")
    cells = width - _LABEL - 1
    if cells < 10:
        raise ValueError(f"{width} characters are too few: give at least {_LABEL + 11}")
    longest_s = max(timeline.step_s for timeline in timelines)
    lines: list[list[_Cell]] = []
    for timeline in timelines:
        lines.append([_Cell(character) for character in _heading(timeline, longest_s)[:width]])
        notes = textwrap.wrap(timeline.note, width - 2)
        lines += [[_Cell(character) for character in f"  {line}"] for line in notes]
        length = max(1, round(timeline.step_s / longest_s * cells))
        for track in _TRACKS:
            label = [_Cell(character) for character in f"  {track}".ljust(_LABEL)]
            lines.append([*label, *_track(timeline, track, length), _Cell(_END)])
    return lines


def _heading(timeline: Timeline, longest_s: float) -> str:
    parts = [f"{timeline.title}: {timeline.step_s * 1e3:.0f} ms"]
    if timeline.step_s < longest_s:
        parts.append(f"{longest_s / timeline.step_s:.2f} times as fast")
    parts.append(f"{timeline.hidden_share:.0%} of the sending hidden behind compute")
    return ", ".join(parts)


def _track(timeline: Timeline, track: Track, length: int) -> list[_Cell]:
    """One track in so many cells; each shows what takes most of its time, if anything does."""
    urgency = Urgency(timeline)
    cells = [_Cell()] * length
    longest = [0.0] * length
    for span in in_turn(span for span in timeline.spans if span.track == track):
        start, end = (at / timeline.step_s * length for at in (span.start_s, span.end_s))
        first, last = max(0, int(start)), min(length, -int(-end // 1))
        drawn = _draw(span, urgency, max(0, last - first))
        for index, cell in enumerate(drawn, first):
            covered = min(end, index + 1) - max(start, index)
            if covered > longest[index]:
                longest[index], cells[index] = covered, cell
    return cells


def _draw(span: Span, urgency: Urgency, length: int) -> list[_Cell]:
    if span.kind == "wait":
        return [_Cell(_WAIT, RED)] * length
    layers = urgency.layers_of(span)
    if span.kind in ("update", "other") or not layers:
        return [_Cell(_BUSY)] * length
    places = [urgency.place(layer) for layer in layers]
    first, last = (_letter(place, len(urgency.layers)) for place in (places[0], places[-1]))
    text = first * length
    if length >= _ROOM and first != last:
        text = first + "-" * (length - 2) + last
    if span.kind == "forward":
        text = text.upper()
    colour = of_place(sum(places) / len(places), pale=span.kind == "backward")
    return [_Cell(character, colour) for character in text]


def _letter(place: float, layers: int) -> str:
    """Every layer has its own letter as long as there are enough."""
    return _LETTERS[round(place * (min(layers, len(_LETTERS)) - 1))]


def _hex(colour: Rgb) -> str:
    return "#" + "".join(f"{round(part * 255):02x}" for part in colour)
