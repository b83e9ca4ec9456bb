"""How ops sum, on ranks that are threads and by numbers that are written by hand."""

from __future__ import annotations

import pytest
import torch

from helpers.fake_ranks import FakeGroup, Meeting, as_threads, ranks_for
from soonest.runtime import comm
from soonest.runtime.comm.bucket_view import Piece


def summed(kind: str, values: list[list[float]], dtype: torch.dtype) -> list[list[float]]:
    """What each rank has after an op on these values by rank."""
    meetings = Meeting(len(values)), Meeting(len(values))

    def each(rank: int) -> list[float]:
        mine = torch.tensor(values[rank], dtype=dtype)
        groups = [FakeGroup(meeting, rank, None) for meeting in meetings]
        comm.run(kind, ranks_for(*groups), Piece(mine, mine))
        return mine.tolist()

    return as_threads(each, len(values))


KINDS = ["all_gather", "exchange", "split"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_gets_the_sum_of_all(kind: str, ranks: int) -> None:
    values = [[float(10**rank), -1.0] for rank in range(ranks)]
    total = [float(sum(10**rank for rank in range(ranks))), -float(ranks)]
    assert summed(kind, values, torch.float32) == [total] * ranks


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_gradients_are_summed_exactly_and_rounded_once(kind: str) -> None:
    """256 + 1 + 1 is 258 in bfloat16, whose numbers there are even; step by step it is 256."""
    values = [[256.0], [1.0], [1.0]]
    assert summed(kind, values, torch.bfloat16) == [[258.0]] * 3
