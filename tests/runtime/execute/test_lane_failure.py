"""The first error of a lane ends it for good, and the other ranks are told once."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime.execute.lane_failure import LaneFailure


class Ranks:
    """Stands for the other ranks."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.asked = 0
        self.given_up: str | None = None

    def tell(self, fault: str) -> None:
        self.told.append(fault)

    def blame(self, what: str, failed: bool) -> str | None:
        self.asked += 1
        return self.given_up

    def failed(self, what: str, how: str, error: Exception) -> SoonestError:
        return PeerLostError(f"{what} {how}: rank 1 did not take part ({error})")


class Lane:
    def __init__(self) -> None:
        self.ranks = Ranks()
        given: Any = self.ranks
        self.failure = LaneFailure(given, self._drop)
        self.seen_at_drop: list[SoonestError | None] = []

    def _drop(self) -> None:
        self.seen_at_drop.append(self.failure.error)


def test_as_long_as_nothing_has_failed_there_is_nothing_to_raise() -> None:
    lane = Lane()
    lane.failure.check()
    lane.failure.ask("bucket 3")
    assert lane.failure.error is None
    assert lane.seen_at_drop == []


def test_the_first_error_counts() -> None:
    lane = Lane()
    lane.failure.fail(SoonestError("the cause"))
    lane.failure.fail(SoonestError("what follows from it"))
    for _ in range(2):
        with pytest.raises(SoonestError, match="the cause"):
            lane.failure.check()
    assert lane.ranks.told == ["the cause"]
    assert [str(error) for error in lane.seen_at_drop] == ["the cause"]


def test_an_error_keeps_no_traceback_alive() -> None:
    lane = Lane()
    try:
        raise PeerLostError("gone")
    except PeerLostError as error:
        lane.failure.fail(error)
    kept = lane.failure.error
    assert type(kept) is PeerLostError
    assert kept.__traceback__ is None


def test_others_are_not_told_of_what_is_not_this_ranks_fault() -> None:
    lane = Lane()
    raised = lane.failure.not_reduced("bucket 3", RuntimeError("reset by peer"))
    assert str(raised) == (
        "bucket 3 could not be reduced over the ranks: rank 1 did not take part (reset by peer)"
    )
    assert lane.ranks.told == []


def test_what_another_rank_has_found_out_ends_this_lane() -> None:
    lane = Lane()
    lane.ranks.given_up = "rank 2 failed"
    message = "^bucket 3 will not be reduced over the ranks: rank 2 failed$"
    with pytest.raises(PeerLostError, match=message):
        lane.failure.ask("bucket 3")
    with pytest.raises(PeerLostError, match=message):
        lane.failure.check()


def test_a_rank_that_has_given_up_looks_for_no_other_verdict() -> None:
    lane = Lane()
    lane.failure.not_reduced("bucket 3", TimeoutError("nothing has moved"))
    lane.ranks.given_up = "rank 2 failed"
    lane.failure.ask("bucket 3")
    assert lane.ranks.asked == 0


def test_of_errors_at_one_time_one_counts() -> None:
    lane, start = Lane(), threading.Barrier(8)

    def fail(number: int) -> None:
        start.wait(timeout=30)
        lane.failure.fail(SoonestError(str(number)))

    threads = [threading.Thread(target=fail, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert lane.ranks.told == [str(lane.failure.error)]
    assert len(lane.seen_at_drop) == 1
