"""The order between the streams of a lane and those on which the user computes, made by events.

No stream waits twice for the same point, nor for one that lies before another that it has waited
for. So waiting for a tensor that has been waited for before costs the device nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from soonest.errors import SoonestError
from soonest.runtime.device.streams import Event, Stream, Streams


class Mark(NamedTuple):
    """A point in one of the lane's streams.

    Args:
        stream: in which it lies.
        number: how many marks of that stream came before.
        event: lets other streams wait for it.
    """

    stream: Stream
    number: int
    event: Event


class StreamOrder:
    """Lets streams wait for points in other streams; the host never waits.

    What the user reads may be read on any stream, and nothing guards it once it has been waited
    for. So whoever waits does so for all streams that the user has been seen to compute on.

    Args:
        streams: of the device.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._last: dict[Stream, Mark] = {}
        # By stream that waits and stream of the lane: the number of the mark it has waited for.
        self._reached: dict[tuple[Stream, Stream], int] = {}
        self._users: tuple[Stream, ...] = ()  # replaced, never changed: any thread may read

    def __repr__(self) -> str:
        marks = [mark.number + 1 for mark in self._last.values()]
        return f"<StreamOrder: {sum(marks)} marks, {len(self._users)} streams of the user>"

    def mark(self, stream: Stream) -> Mark:
        """The point that one of the lane's streams has been filled up to."""
        before = self._last.get(stream)
        number = 0 if before is None else before.number + 1
        mark = self._last[stream] = Mark(stream, number, self._streams.record(stream))
        return mark

    def last(self, stream: Stream) -> Mark | None:
        """The latest mark of one of the lane's streams."""
        return self._last.get(stream)

    def follow(self, stream: Stream, mark: Mark) -> None:
        """Lets a stream wait for a mark, unless it has waited for that or for a later one."""
        way = (stream, mark.stream)
        if self._reached.get(way, -1) < mark.number:
            self.refuse_graphs()
            self._streams.wait(stream, mark.event)
            self._reached[way] = mark.number

    def follow_user(self, stream: Stream) -> None:
        """Lets a stream of the lane wait for all that is enqueued on the user's current one."""
        current = self.see_user()
        self._streams.wait(stream, self._streams.record(current))

    def users_follow(self, mark: Mark) -> None:
        """Lets all streams of the user wait for a mark."""
        self.see_user()
        for stream in self._users:
            self.follow(stream, mark)

    def users_follow_all(self) -> None:
        """Lets all streams of the user wait for everything that the lane has enqueued."""
        for mark in self._last.values():
            self.users_follow(mark)

    def see_user(self) -> Stream:
        """The current stream, which is one of the user's from now on."""
        current = self._streams.current()
        if current not in self._users:
            self._users = (*self._users, current)
            for mark in self._last.values():  # others may have waited for some of it already
                self.follow(current, mark)
        return current

    def spread(self, used: Iterable[Tensor] = ()) -> None:
        """Makes work on the current stream visible to all streams of the user.

        Args:
            used: by that work; what is perhaps freed right away is kept until it is done.
        """
        current = self.see_user()
        others = [stream for stream in self._users if stream != current]
        if others:
            self.refuse_graphs()
            now = self._streams.record(current)
            for stream in others:
                self._streams.wait(stream, now)
        for tensor in used:
            self._streams.keep(tensor, current)

    def refuse_graphs(self) -> None:
        """Raises SoonestError if what the device is given now is recorded to be run again."""
        if self._streams.capturing():
            raise SoonestError(
                "a graph of the device's operations is being captured, and when it runs again "
                "nothing in it would wait for parameters that are still on their way: train "
                "without graphs, or detach() the handle before"
            )
