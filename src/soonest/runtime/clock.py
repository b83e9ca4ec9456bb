"""Times on a device's own clock, noted without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from soonest.runtime.streams import Streams

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
