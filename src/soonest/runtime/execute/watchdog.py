"""What a device has been given to do and has not been seen to end."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from soonest.runtime.device.streams import Event
from soonest.runtime.execute.lane_failure import LaneFailure

_LOOK_S = 1.0
"""If nothing ends for so long, others are asked whether one of them has given up."""
_DRAIN_LOOK_S = 1e-3
"""How often a host that waits looks whether something has ended."""


class _Entry(NamedTuple):
    """One op or update that the device has been given.

    Args:
        end: the point in its stream behind it.
        what: says in words what it is.
        since_s: when it was enqueued, seconds on the monotonic clock.
    """

    end: Event
    what: Callable[[], str]
    since_s: float


class Enqueued:
    """The ops and updates that are under way on a device, the oldest first.

    Args:
        timeout_s: how long nothing may come to an end, seconds.
        failure: what ended the lane, or will when something here does not end.
        broken: says what the backend knows to have failed; None if nothing has.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        failure: LaneFailure,
        broken: Callable[[], str | None],
    ) -> None:
        self._timeout_s = timeout_s
        self._failure = failure
        self._broken = broken
        self._entries: deque[_Entry] = deque()
        self._progressed_s = self._asked_s = time.monotonic()

    def add(self, end: Event, what: Callable[[], str]) -> None:
        self._entries.append(_Entry(end, what, time.monotonic()))

    def look(self) -> None:
        """Forgets what has ended; never waits.

        Raises:
            SoonestError: something failed, or does not end.
        """
        self._failure.check()
        entries = self._entries
        try:
            while entries and entries[0].end.query():
                entries.popleft()
                self._progressed_s = time.monotonic()
        except RuntimeError as error:
            raise self._failure.not_reduced(entries[0].what(), error) from error
        if not entries:
            return
        oldest = entries[0]
        if (why := self._broken()) is not None:
            raise self._failure.not_reduced(oldest.what(), RuntimeError(why))
        now = time.monotonic()
        idle_s = now - max(oldest.since_s, self._progressed_s)
        if idle_s > self._timeout_s:
            raise self._failure.not_reduced(
                oldest.what(), TimeoutError(f"nothing has moved for {idle_s:.0f} s")
            )
        if idle_s > _LOOK_S and now - self._asked_s > _LOOK_S:
            self._asked_s = now
            self._failure.ask(oldest.what())

    def drain(self, limit_s: float = math.inf) -> str | None:
        """Lets the host wait until nothing is under way, or for so long.

        Returns:
            What is under way then, in words; None if nothing is.

        Raises:
            SoonestError: as ``look``.
        """
        over_s = time.monotonic() + limit_s
        while self._entries:
            self.look()
            if self._entries:
                if time.monotonic() > over_s:
                    return self._entries[0].what()
                time.sleep(_DRAIN_LOOK_S)
        return None

    def clear(self) -> None:
        """Forgets everything: nothing will come of it."""
        self._entries.clear()

    def __repr__(self) -> str:
        oldest = f", first {self._entries[0].what()}" if self._entries else ""
        return f"<Enqueued: {len(self._entries)} under way{oldest}>"
