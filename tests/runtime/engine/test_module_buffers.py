"""Whose buffers ranks get, and when."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import soonest
from helpers.fake_ranks import FakeGroup, Meeting, as_threads
from helpers.ranks import run_ranks
from helpers.worlds import FAILURES
from soonest.errors import SoonestError
from soonest.runtime.engine.module_buffers import Buffers
from soonest.runtime.execute.thread_lane import ThreadLane

BATCHES = (1, 3)
"""By rank: the second one goes on when the first has no input any more."""


def batch(rank: int, number: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * rank + number)) + rank


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()


def uneven(by_all: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What soonest and DistributedDataParallel make of it."""
    rank, found = dist.get_rank(), list[dict[str, Any]]()
    for ddp in (False, True):
        model: nn.Module = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if ddp:
            called: Any = DistributedDataParallel(model)
            join = called.join
        else:
            called, join = model, soonest.prioritize(model, optimizer).join
        with join(divide_by_initial_world_size=by_all):
            for number in range(BATCHES[rank]):
                optimizer.zero_grad()
                called(batch(rank, number).double()).square().mean().backward()
                optimizer.step()
        found.append(pickle.loads(pickle.dumps(model.state_dict())))
    return found[0], found[1]


@pytest.mark.parametrize("by_all", [True, False])
def test_with_uneven_inputs_statistics_are_those_of_a_rank_that_still_has_some(
    by_all: bool,
) -> None:
    for ours, theirs in run_ranks(uneven, 2, by_all):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)


class Model(nn.Module):
    def __init__(self, value: float, *, size: int = 2) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((size,), value))


def on_threads(each: Any, ranks: int = 2) -> list[Any]:
    """Calls ``each(rank, model, buffers)`` with buffers that hold each rank's number plus 1."""
    meeting = Meeting(ranks)

    def run(rank: int) -> Any:
        model, lane = Model(rank + 1.0), ThreadLane(timeout_s=30, failures=FAILURES)
        group: Any = FakeGroup(meeting, rank, None)
        return each(rank, model, Buffers(model, lambda: group, lane, FAILURES))

    return as_threads(run, ranks)


def values(model: Any) -> list[float]:
    return model.mean.tolist()


def test_they_are_sent_behind_a_backward_pass_and_taken_before_the_next_forward_pass() -> None:
    def each(rank: int, model: Model, buffers: Buffers) -> list[list[float]]:
        buffers.forward_begins(0)
        seen = [values(model)]
        buffers.forward_ended(synchronizing=True)
        buffers.share(0)
        seen.append(values(model))
        buffers.forward_begins(0)
        return [*seen, values(model)]

    first, second = on_threads(each)
    assert first == [[1.0, 1.0]] * 3
    assert second == [[2.0, 2.0], [2.0, 2.0], [1.0, 1.0]]


def test_after_a_pass_that_is_not_combined_each_rank_keeps_its_own() -> None:
    def each(rank: int, model: Any, buffers: Buffers) -> list[float]:
        buffers.forward_begins(0)
        buffers.forward_ended(synchronizing=True)
        buffers.share(0)
        buffers.forward_ended(synchronizing=False)
        buffers.forward_begins(0)
        return values(model)

    assert on_threads(each) == [[1.0, 1.0], [2.0, 2.0]]


def test_what_all_ranks_have_changed_meanwhile_is_sent_as_it_is_by_then() -> None:
    def each(rank: int, model: Any, buffers: Buffers) -> list[float]:
        buffers.forward_begins(0)
        buffers.forward_ended(synchronizing=True)
        buffers.share(0)
        model.mean.fill_(10.0 + rank)
        buffers.forward_begins(0)
        return values(model)

    assert on_threads(each) == [[10.0, 10.0]] * 2


def test_of_ranks_with_input_the_last_one_counts() -> None:
    def each(rank: int, model: Any, buffers: Buffers) -> list[float]:
        buffers.forward_begins(0)
        buffers.forward_ended(synchronizing=True)
        buffers.share(0, active=rank == 1)
        buffers.forward_begins(0)
        return values(model)

    assert on_threads(each, 3) == [[2.0, 2.0]] * 3


def test_a_rank_with_other_buffers_says_so() -> None:
    def each(rank: int, model: Any, buffers: Buffers) -> str | None:
        buffers.forward_begins(0)
        buffers.forward_ended(synchronizing=True)
        if rank == 1:
            model.mean = torch.zeros(3)
        buffers.share(0)
        try:
            buffers.forward_begins(0)
        except SoonestError as error:
            return str(error)
        return None

    first, second = on_threads(each)
    assert first is None
    assert second is not None
    assert "new here: mean (3,) torch.float32" in second
