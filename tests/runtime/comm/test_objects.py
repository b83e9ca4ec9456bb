"""What ranks tell each other, on ranks that are threads."""

from __future__ import annotations

from typing import Any

from helpers.fake_ranks import FakeGroup, Meeting, as_threads
from soonest.runtime import comm


def with_group(function: Any, ranks: int = 3) -> list[Any]:
    meeting = Meeting(ranks)
    return as_threads(lambda rank: function(FakeGroup(meeting, rank, None), rank), ranks)


def test_values_of_any_size_come_by_rank() -> None:
    told = with_group(lambda group, rank: comm.gather_objects(group, "x" * 10**rank))
    assert told == [["x", "x" * 10, "x" * 100]] * 3


def test_the_value_of_the_first_rank_is_that_of_all() -> None:
    told = with_group(lambda group, rank: comm.first_rank_object(group, [rank] * (rank + 1)))
    assert told == [[0]] * 3


def test_the_last_rank_for_which_something_is_so() -> None:
    assert with_group(lambda group, rank: comm.last_of(group, mine=rank < 2)) == [1] * 3
    assert with_group(lambda group, rank: comm.last_of(group, mine=rank == 0)) == [0] * 3
