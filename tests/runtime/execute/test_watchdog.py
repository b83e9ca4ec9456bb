"""What is under way on a device: forgotten when it has ended, and told of when it does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime.execute import watchdog
from soonest.runtime.execute.lane_failure import LaneFailure
from soonest.runtime.execute.watchdog import Enqueued


class Time:
    """Moves only when it is told to, or slept for."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class FailureReporter:
    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.told: list[str] = []
        self.given_up: str | None = None

    def blame(self, what: str, failed: bool) -> str | None:
        self.asked.append((what, failed))
        return "rank 3 did not take part" if failed else self.given_up

    def failed(self, what: str, how: str, error: Exception, advice: str = "") -> SoonestError:
        return PeerLostError(f"{what} {how}: {self.blame(what, True)} ({error})")

    def tell(self, fault: str) -> None:
        self.told.append(fault)


class Event:
    def __init__(self, at_s: float, time: Time) -> None:
        self._at_s, self._time = at_s, time

    def query(self) -> bool:
        return self._time.now_s >= self._at_s


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    time, failures = Time(), FailureReporter()
    monkeypatch.setattr(watchdog, "time", time)
    given: Any = failures
    failure = LaneFailure(given, lambda: found.clear())
    found = Enqueued(timeout_s=60, failure=failure, broken=lambda: None)
    return SimpleNamespace(time=time, failures=failures, failure=failure, enqueued=found)


def add(world: Any, name: str, at_s: float) -> None:
    world.enqueued.add(Event(at_s, world.time), lambda: name)


def test_what_ends_is_forgotten(world: Any) -> None:
    add(world, "first", 101)
    add(world, "second", 102)
    world.enqueued.look()
    world.time.now_s = 100 + 55
    world.enqueued.look()
    world.time.now_s = 100 + 1000
    world.enqueued.look()
    assert world.failures.asked == []


def test_nothing_is_asked_as_long_as_something_ends_each_second(world: Any) -> None:
    for second in range(200):
        add(world, f"op {second}", 100 + second)
    for second in range(200):
        world.time.now_s = 100 + second + 0.5
        world.enqueued.look()
    assert world.failures.asked == []


def test_a_pause_in_which_nothing_was_enqueued_is_no_wait(world: Any) -> None:
    add(world, "first", 101)
    world.time.now_s = 100 + 1000
    world.enqueued.look()
    world.time.now_s += 1000
    add(world, "second", 10_000)
    world.time.now_s += 0.5
    world.enqueued.look()
    assert world.failures.asked == []


def test_others_are_asked_once_a_second_about_what_takes_long(world: Any) -> None:
    add(world, "bucket 7", 10_000)
    for _ in range(20):
        world.time.now_s += 0.25
        world.enqueued.look()
    assert len(world.failures.asked) == 4
    assert set(world.failures.asked) == {("bucket 7", False)}
    world.failures.given_up = "rank 2 failed"
    world.time.now_s += 1.5
    with pytest.raises(PeerLostError, match=r"bucket 7 will not be reduced.*: rank 2 failed"):
        world.enqueued.look()
    assert world.failures.told == []  # the others know


def test_after_the_timeout_it_is_an_error_for_good(world: Any) -> None:
    add(world, "bucket 7", 10_000)
    world.time.now_s += 61
    for _ in range(2):
        with pytest.raises(
            PeerLostError, match=r"bucket 7 .*: rank 3 did not take part .*for 61 s"
        ):
            world.enqueued.look()
    assert world.failures.asked == [("bucket 7", True)]


def test_what_is_wrong_here_is_told_to_the_others(world: Any) -> None:
    known = world.failure.fail(KeyError("boom"))
    assert str(known) == "an update failed: KeyError('boom')"
    assert world.failures.told == [str(known)]
    with pytest.raises(SoonestError, match="boom"):
        world.enqueued.look()


def test_it_can_be_waited_for(world: Any) -> None:
    add(world, "op", 100.5)
    world.enqueued.drain()
    assert 100.5 <= world.time.now_s < 101


def test_it_can_be_waited_for_until_a_limit(world: Any) -> None:
    add(world, "first", 101)
    add(world, "second", 105)
    assert world.enqueued.drain(2) == "second"
    assert 102 <= world.time.now_s < 103
    assert world.enqueued.drain(60) is None


def test_waiting_for_it_does_not_hang(world: Any) -> None:
    add(world, "op", 10_000)
    with pytest.raises(PeerLostError, match="op could not be reduced"):
        world.enqueued.drain()
    assert world.time.now_s < 170
