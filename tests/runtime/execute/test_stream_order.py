"""Streams wait for what they have to, and for nothing twice."""

from __future__ import annotations

from typing import Any

import pytest

from soonest.errors import SoonestError
from soonest.runtime.execute.stream_order import StreamOrder


class Streams:
    """Writes down who waits for what; an event is its stream and how many came before in it."""

    def __init__(self) -> None:
        self.here = "main"
        self.in_graph = False
        self.recorded = 0
        self.waits: list[tuple[str, str]] = []
        self.kept: list[tuple[Any, str]] = []

    def current(self) -> str:
        return self.here

    def record(self, stream: str) -> str:
        self.recorded += 1
        return f"{stream} {self.recorded}"

    def wait(self, stream: str, event: str) -> None:
        self.waits.append((stream, event))

    def keep(self, tensor: Any, stream: str) -> None:
        self.kept.append((tensor, stream))

    def capturing(self) -> bool:
        return self.in_graph

    def new_waits(self) -> list[tuple[str, str]]:
        waits, self.waits = self.waits, []
        return waits


def order_of(streams: Streams) -> StreamOrder:
    given: Any = streams
    return StreamOrder(given)


def test_no_stream_waits_twice_nor_for_an_earlier_point() -> None:
    streams = Streams()
    order = order_of(streams)
    first, second = order.mark("ops"), order.mark("ops")
    order.follow("updates", second)
    order.follow("updates", second)
    order.follow("updates", first)
    assert streams.new_waits() == [("updates", "ops 2")]
    order.follow("updates", order.mark("ops"))
    assert streams.new_waits() == [("updates", "ops 3")]


def test_all_streams_of_the_user_wait() -> None:
    streams = Streams()
    order = order_of(streams)
    order.see_user()
    streams.here = "side"
    order.users_follow(order.mark("ops"))
    assert streams.new_waits() == [("side", "ops 1"), ("main", "ops 1")]


def test_a_new_stream_of_the_user_waits_for_all_that_others_have_waited_for() -> None:
    streams = Streams()
    order = order_of(streams)
    order.users_follow(order.mark("ops"))
    order.users_follow(order.mark("updates"))
    streams.new_waits()
    streams.here = "side"
    order.see_user()
    order.see_user()
    assert streams.new_waits() == [("side", "ops 1"), ("side", "updates 2")]


def test_everything_can_be_waited_for() -> None:
    streams = Streams()
    order = order_of(streams)
    order.see_user()
    for stream in ("ops", "ops", "updates"):
        order.mark(stream)
    order.users_follow_all()
    assert streams.new_waits() == [("main", "ops 2"), ("main", "updates 3")]


def test_work_outside_of_the_lane_is_visible_to_all_other_streams() -> None:
    streams = Streams()
    order = order_of(streams)
    for streams.here in ("main", "side"):
        order.see_user()
    given: Any = "a tensor"
    order.spread([given])
    assert streams.new_waits() == [("main", "side 1")]
    assert streams.kept == [("a tensor", "side")]


def test_a_lane_stream_waits_for_what_the_user_has_enqueued() -> None:
    streams = Streams()
    order_of(streams).follow_user("updates")
    assert streams.new_waits() == [("updates", "main 1")]


def test_a_graph_is_refused_only_where_something_would_be_waited_for() -> None:
    streams = Streams()
    order = order_of(streams)
    mark = order.mark("ops")
    order.users_follow(mark)
    streams.in_graph = True
    order.users_follow(mark)
    with pytest.raises(SoonestError, match="graph of the device's operations"):
        order.users_follow(order.mark("ops"))
