"""What happened when in one training step, measured or simulated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

Kind = Literal["forward", "backward", "wait", "send", "update", "other"]
"""``wait`` is the compute standing still for the network; ``send`` is any collective."""

Track = Literal["compute", "network", "update"]


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that took time.

    Args:
        track: the row it belongs to.
        kind: what it was.
        name: the layer or the bucket.
        start_s, end_s: seconds since the step began.
    """

    track: Track
    kind: Kind
    name: str
    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        assert self.end_s >= self.start_s, f"{self.name} ends before it starts"


@dataclass(frozen=True)
class Timeline:
    """One step, from the start of a backward pass to the start of the next one.

    That is the natural period of a step here: gradients appear in the backward pass, and their
    updated parameters are needed in the forward pass after it.

    Args:
        title: what ran, for example ``soonest`` or ``ddp``.
        step_s: length of the step in seconds.
        spans: in no particular order; spans of one track may overlap.
        note: what there is to say besides, such as which rank is late; one sentence.
    """

    title: str
    step_s: float
    spans: tuple[Span, ...]
    note: str = ""

    def of(self, *kinds: Kind) -> list[Span]:
        """The spans of these kinds, earliest first."""
        assert all(kind in get_args(Kind) for kind in kinds)
        return sorted((s for s in self.spans if s.kind in kinds), key=lambda s: s.start_s)

    def busy_s(self, *kinds: Kind) -> float:
        """Seconds in which at least one span of these kinds runs."""
        return covered_s((s.start_s, s.end_s) for s in self.of(*kinds))

    @property
    def hidden_share(self) -> float:
        """Share of the network's busy time, 0 to 1, during which the compute was not waiting."""
        sending, waiting = self.busy_s("send"), self.busy_s("wait")
        return max(0.0, 1.0 - waiting / sending) if sending else 1.0

    def scaled(self, factor: float, *, title: str | None = None) -> Timeline:
        """The same step with all times multiplied, as one replayed in slow motion needs it."""
        spans = (
            replace(span, start_s=span.start_s * factor, end_s=span.end_s * factor)
            for span in self.spans
        )
        return Timeline(title or self.title, self.step_s * factor, tuple(spans), self.note)

    def to_json(self) -> dict[str, Any]:
        spans = [asdict(span) for span in self.spans]
        note = {"note": self.note} if self.note else {}
        return {"title": self.title, "step_s": self.step_s, "spans": spans, **note}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timeline:
        spans = tuple(Span(**span) for span in data["spans"])
        return cls(data["title"], data["step_s"], spans, data.get("note", ""))


def covered_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of ``(start, end)`` intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
