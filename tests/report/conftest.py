from typing import Any

import pytest
from matplotlib.figure import Figure

from soonest.core.timeline import Kind, Span, Timeline, Track


def step(title: str, *spans: tuple[Track, Kind, str, float, float], step_s: float) -> Timeline:
    return Timeline(title, step_s, tuple(Span(*span) for span in spans))


@pytest.fixture
def plain() -> Timeline:
    """Two layers, one bucket behind the whole backward pass."""
    return step(
        "plain",
        ("compute", "backward", "b", 0.0, 0.1),
        ("compute", "backward", "a", 0.1, 0.2),
        ("network", "send", "bucket 0 (1.05 MB of a, b)", 0.2, 0.6),
        ("compute", "wait", "all", 0.2, 0.6),
        ("update", "update", "all", 0.6, 0.7),
        ("compute", "forward", "a", 0.7, 0.8),
        ("compute", "forward", "b", 0.8, 1.0),
        step_s=1.0,
    )


@pytest.fixture
def overlapped() -> Timeline:
    """The same with two buckets in flight together, of which the second hides wholly."""
    return step(
        "overlapped",
        ("compute", "backward", "b", 0.0, 0.1),
        ("compute", "backward", "a", 0.1, 0.2),
        ("network", "send", "bucket 1 (0.50 MB of b)", 0.1, 0.5),
        ("network", "send", "bucket 0 (0.50 MB of a)", 0.2, 0.3),
        ("compute", "wait", "a", 0.2, 0.3),
        ("update", "update", "a", 0.3, 0.31),
        ("compute", "forward", "a", 0.3, 0.4),
        ("compute", "wait", "b", 0.4, 0.5),
        ("compute", "forward", "b", 0.5, 0.6),
        step_s=0.6,
    )


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn meanwhile: a file's size says nothing of what is on it."""
    found: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        found.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found
