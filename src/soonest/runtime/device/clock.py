"""Times on a device's own clock, noted without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from soonest.runtime.device.streams import Streams

now_s = time.perf_counter


class Moment(float):
    """A time of the host that stands for a point in a stream until the device has got there.

    Attributes:
        event: the point.
    """

    event: Any


class DeviceClock:
    """Notes points in a device's current stream, and tells later when it got there.

    Args:
        streams: of the device; times are those of the current one.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def now(self) -> Moment:
        """Notes the point that the current stream has been filled up to."""
        moment = Moment(now_s())
        moment.event = self._streams.record(self._streams.current(), timed=True)
        return moment

    def seconds(self, moments: Iterable[float]) -> list[float]:
        """Turns moments into seconds since the first; waits until the device has got there.

        Mere numbers among them stay as they are.
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
        """How long the device took from one moment to the other; waits until it has got there."""
        return self._streams.seconds(first.event, last.event)


class Ends:
    """Tells when steps ended on a device, once that is known, as the host does not wait for it.

    Args:
        clock: of the device.
    """

    def __init__(self, clock: DeviceClock) -> None:
        self._clock = clock
        self._coming: deque[Moment] = deque()
        self._last: Moment | None = None
        self._at_s = 0.0

    def step(self) -> list[float]:
        """Notes the end of a step in the current stream.

        Returns:
            End times (s) of steps that finished since the last call, counted from the first.
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
