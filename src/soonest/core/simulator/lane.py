"""The network and the updates of one simulated step, as two recurrences.

An op first waits out its latency and then transfers. The latency of an op in flight passes while
others transfer, but transfers are serial, in the order of issue, because they use the same links.
So a window of two hides the latency of every op whose predecessor transfers for at least as long,
and a window of one hides none. Updates run beside the computation, and one that has begun is not
put off, so what arrives earlier may hold up what is needed first.

All that simulates a step goes through here, but for one copy: ``planner/unrolled.py`` repeats both
recurrences in one loop, for a search that runs it a hundred thousand times.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

Interval = tuple[float, float]
"""Start and end, seconds."""

_Key = TypeVar("_Key")
_Of = TypeVar("_Of", contravariant=True)


class _Times(Protocol[_Of]):
    """A list by index or a dictionary by key, of seconds."""

    def __getitem__(self, key: _Of, /) -> float: ...

    def __setitem__(self, key: _Of, value: float, /) -> None: ...


class Lane:
    """What issues the ops of one step, strictly in order, and the network that carries them.

    Args:
        window: how many ops may be in flight.

    Attributes:
        issued: per op, when it was issued.
        transfers: per op, start and end of its transfer; its latency is just before.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._alone = False
        self.issued: list[float] = []
        self.transfers: list[Interval] = []

    @property
    def end_s(self) -> float:
        """When the last op has ended; zero before there is any."""
        return self.transfers[-1][1] if self.transfers else 0.0

    @property
    def free_s(self) -> float:
        """When the window has room for another op."""
        behind = 1 if self._alone else self._window
        return self.transfers[-behind][1] if len(self.transfers) >= behind else 0.0

    def send(self, ops: Iterable[tuple[_Key, float, float, bool]], at_s: _Times[_Key]) -> None:
        """Issues some more ops, each as soon as can be.

        Args:
            ops: each with its bucket, its latency and transfer in seconds, and whether no other is
                issued behind it before it is done.
            at_s: per bucket, when what is sent first is ready; becomes the end of its last op.
        """
        window, alone = self._window, self._alone
        every, transfers = self.issued, self.transfers
        issued, end = (every[-1], transfers[-1][1]) if every else (0.0, 0.0)
        for position, (bucket, latency_s, transfer_s, next_alone) in enumerate(ops, len(transfers)):
            # Behind the op in front, whatever is ready: neither is issued nor transfers before it.
            issued = max(issued, at_s[bucket])
            behind = 1 if alone else window
            if position >= behind:
                issued = max(issued, transfers[position - behind][1])
            start = max(issued + latency_s, end)
            end = at_s[bucket] = start + transfer_s
            every.append(issued)
            transfers.append((start, end))
            alone = next_alone
        self._alone = alone


def one_by_one(
    by_need: Sequence[int],
    ready_s: Mapping[int, float] | Sequence[float],
    duration_s: Sequence[float],
    from_s: float,
) -> list[Interval | None]:
    """Updates one item at a time, the one needed first among those that are ready.

    Args:
        by_need: the items, the one needed first in front.
        ready_s, duration_s: per item.
        from_s: nothing is updated before.

    Returns:
        Per item, when it is updated; None if it is not among those needed.
    """
    intervals: list[Interval | None] = [None] * len(duration_s)
    coming = sorted((ready_s[item], place) for place, item in enumerate(by_need))
    waiting: list[int] = []
    now, arrived = from_s, 0
    for ready, _ in coming:
        now = max(now, ready)  # If this one is not ready, all in front of it have been updated.
        while arrived < len(coming) and coming[arrived][0] <= now:
            heapq.heappush(waiting, coming[arrived][1])
            arrived += 1
        item = by_need[heapq.heappop(waiting)]
        start, now = now, now + duration_s[item]
        intervals[item] = (start, now)
    return intervals
