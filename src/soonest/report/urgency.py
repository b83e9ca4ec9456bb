"""Which layers a span belongs to, and how soon the forward pass needs them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from soonest.core.timeline import Span, Timeline

_SEPARATORS = re.compile(r"[\s,;+()]+")
_MORE = re.compile(r"\band (\d+) more\b")


class Urgency:
    """The layers of one step in the order in which its forward pass needs them.

    Args:
        timeline: the step.

    Attributes:
        layers: their names, first needed first.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.layers = list(dict.fromkeys(span.name for span in timeline.of("forward")))
        self._index = {name: index for index, name in enumerate(self.layers)}

    def layers_of(self, span: Span) -> list[str]:
        """The layers that a span belongs to, first needed first; empty if it names none.

        A bucket's name says which layers it carries, for example ``bucket 3 (1.05 MB of a, b)``.
        It may leave out those behind the first few, ``a, b and 7 more``: they come next in line.
        """
        if span.name in self._index:
            return [span.name]
        named = {self._index[word] for word in _SEPARATORS.split(span.name) if word in self._index}
        if named and (more := _MORE.search(span.name)):
            named.update(range(max(named) + 1, max(named) + 1 + int(more[1])))
        return [self.layers[index] for index in sorted(named) if index < len(self.layers)]

    def place(self, layer: str) -> float:
        """From 0.0, needed first, to 1.0, needed last."""
        return self._index[layer] / max(1, len(self.layers) - 1)


def in_turn(spans: Iterable[Span]) -> list[Span]:
    """The spans, cut where they overlap: every moment belongs to the one that ends first.

    Collectives in flight together use the same links, so what tells them apart is when they end.
    """
    taken: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.end_s, s.start_s)):
        free_s = span.start_s
        pieces: list[Span] = []
        for other in taken:
            if other.start_s > free_s:
                pieces.append(replace(span, start_s=free_s, end_s=other.start_s))
            free_s = max(free_s, other.end_s)
        if free_s < span.end_s:
            pieces.append(replace(span, start_s=free_s))
        taken = sorted([*taken, *pieces], key=lambda s: s.start_s)
    return taken
