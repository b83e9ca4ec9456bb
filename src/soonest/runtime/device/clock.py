"""Times on a device's own clock, noted without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from soonest.runtime.device.streams import Streams

now_s = time.perf_counter


class Moment(float):
    """A time of the host, which stands for a point in a stream until that can be asked.

    Attributes:
        event: the point.
    """

    event: Any


class DeviceClock:
    """Tells when a device gets to where the host is now.

    Args:
        streams: of the device; times are those of the current one.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def now(self) -> Moment:
        moment = Moment(now_s())
        moment.event = self._streams.record(self._streams.current(), timed=True)
        return moment

    def seconds(self, moments: Iterable[float]) -> list[float]:
        """The same as seconds since the first of them; waits until the device has got there.

        What is no moment, but a mere number, stays as it is.
        """
        found = list(moments)
        known = [moment for moment in found if isinstance(moment, Moment)]
        if not known:
            return found
        first = min(known)
        return [
            self._streams.seconds(first.event, moment.event)
            if isinstance(moment, Moment)
            else moment
            for moment in found
        ]

    def seconds_between(self, first: Moment, last: Moment) -> float:
        """How long the device took from one to the other; waits until it has got there."""
        return self._streams.seconds(first.event, last.event)


class Ends:
    """When steps end on a device, told as soon as that is known, as the host does not wait for it.

    Args:
        clock: of the device.
    """

    def __init__(self, clock: DeviceClock) -> None:
        self._clock = clock
        self._coming: deque[Moment] = deque()
        self._last: Moment | None = None
        self._at_s = 0.0

    def step(self) -> list[float]:
        """A step ends here.

        Returns:
            When those ended of which that was not known before, seconds since the first.
        """
        self._coming.append(self._clock.now())
        known: list[float] = []
        while self._coming and self._coming[0].event.query():
            moment = self._coming.popleft()
            if self._last is not None:
                self._at_s += self._clock.seconds_between(self._last, moment)
            self._last = moment
            known.append(self._at_s)
        return known
