"""The shortest and plainest loop that still comes out wrong in the same way."""

from __future__ import annotations

import time
from dataclasses import replace

from fuzz.loops import Loop, simpler
from fuzz.pair import DIFFERENT, Outcome, Pair


def shrink(pair: Pair, loop: Loop, arm: str, limit_s: float = 60.0) -> tuple[Loop, Outcome]:
    """Leaves out lines, and makes plainer what is left, as long as the outcome stays.

    Args:
        pair: trains.
        loop: which came out wrong.
        arm: the way in which it was trained.
        limit_s: what is found by then has to do.

    Returns:
        The loop, and how it comes out.
    """
    deadline = time.monotonic() + limit_s
    outcome = pair.train_as(loop, arm)
    kind = _kind(outcome)

    def still(other: Loop) -> bool:
        nonlocal loop, outcome
        if time.monotonic() > deadline:
            return False
        found = pair.train_as(other, arm)
        if _kind(found) != kind:
            return False
        loop, outcome = other, found
        return True

    if outcome.at >= 0:
        still(replace(loop, lines=loop.lines[: outcome.at + 1]))
    while True:
        before = loop
        size = max(1, len(loop.lines) // 2)
        while size:
            start = 0
            while start < len(loop.lines):
                lines = (*loop.lines[:start], *loop.lines[start + size :])
                if not still(replace(loop, lines=lines)):
                    start += size
            size //= 2
        if not any(still(other) for other in simpler(loop)) and loop == before:
            return loop, outcome
        if time.monotonic() > deadline:
            return loop, outcome


def _kind(outcome: Outcome) -> tuple[str, str]:
    """What has to stay: in an error, which one it is."""
    name = "" if outcome.kind == DIFFERENT else outcome.text.partition(":")[0]
    return outcome.kind, name
