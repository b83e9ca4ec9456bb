"""Tensors of one rank for all, on ranks that are threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.fake_ranks import FakeGroup, Meeting, as_threads
from soonest.runtime import comm


def group_of(meeting: Meeting, rank: int) -> Any:
    return FakeGroup(meeting, rank, None)


def test_all_get_the_values_of_one_rank_whatever_their_dtypes() -> None:
    meeting = Meeting(2)

    def each(rank: int) -> list[Tensor]:
        tensors = [
            torch.full((2, 2), 1.5 + rank),
            torch.tensor(7 + rank),
            torch.tensor([2**24 + 1 + 2 * rank], dtype=torch.int32),
            torch.full((3,), -2.0 - rank),
        ]
        comm.broadcast(group_of(meeting, rank), tensors, 1)
        return tensors

    for tensors in as_threads(each, 2):
        assert [t.flatten().tolist() for t in tensors] == [[2.5] * 4, [8], [2**24 + 3], [-3.0] * 3]


def test_a_backward_pass_that_has_saved_a_buffer_goes_on() -> None:
    """As with DistributedDataParallel, whose buffers come between two backward passes, too."""
    meeting = Meeting(2)

    def each(rank: int) -> tuple[int, list[float]]:
        scale, x = torch.full((2,), 3.0 - rank), torch.ones(2, requires_grad=True)
        before = scale._version
        loss = (x * x * scale).sum()
        loss.backward(retain_graph=True)
        # Of one tensor alone the fake group would write to that itself, as no backend does.
        comm.broadcast(group_of(meeting, rank), [scale, torch.zeros(1)])
        loss.backward()  # raises if the saved buffer counts as changed
        return scale._version - before, scale.tolist()

    assert as_threads(each, 2) == [(0, [3.0, 3.0])] * 2


def test_what_is_sent_is_what_was_there_when_it_began() -> None:
    meeting = Meeting(2)

    def each(rank: int) -> tuple[list[float], list[float]]:
        tensor = torch.full((2,), float(rank))
        (sent,) = comm.start_broadcast(group_of(meeting, rank), [tensor], 0)
        tensor.fill_(5.0)
        sent.work.wait()
        seen = sent.memory.tolist()
        sent.unpack()
        return seen, tensor.tolist()

    source, other = as_threads(each, 2)
    assert source == ([0.0, 0.0], [5.0, 5.0]), "the source keeps what it has by now"
    assert other == ([0.0, 0.0], [0.0, 0.0])
