"""Parts of parameters, by places that are written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.fake_ranks import FakeGroup, Meeting, as_threads, ranks_for
from helpers.worlds import FAILURES
from soonest.core.plan import Bucket, Op, Plan
from soonest.runtime.comm import EXACT, Wire
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.optim.grad_norm import clip
from soonest.runtime.optim.shard import firsts_of, in_memory, shards_of
from soonest.runtime.optim.sharded_state import ShardedState
from soonest.runtime.optim.state_entries import is_per_element


class Model(nn.Module):
    """20 elements, none, and 20: with their counts at 0, 32 and 48 of 80."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in (("a", 20), ("none", 0), ("b", 20)):
            self.register_parameter(name, nn.Parameter(torch.arange(float(size))))


def one_bucket() -> tuple[FlatBuffers, Plan]:
    layout = FlatBuffers(Model())
    (flat,) = layout.flats
    assert ([slot.start for slot in flat.slots], flat.numel) == ([0, 32, 48], 80)
    ops = (Op(0, "reduce_scatter"), Op(0, "all_gather_parameters"))
    return layout, Plan(2, layout.flats, (Bucket(0, 0, 80, "shard_direct", ("x",)),), ops)


def test_ranks_have_equal_parts_of_a_bucket_and_none_twice() -> None:
    """80 elements in two parts that are multiples of 16: 48 and 32."""
    layout, plan = one_bucket()
    keys = [[share.key for share in shards_of(plan, layout, rank, EXACT)[0]] for rank in range(2)]
    assert keys == [[("a", 0, 20), ("none", 0, 0)], [("b", 0, 20)]]
    assert firsts_of(plan, 0) == [(0, 0), (32, 32), (48, 48)]


def test_a_part_is_the_memory_of_its_parameter() -> None:
    layout, plan = one_bucket()
    (share,) = shards_of(plan, layout, 1, EXACT)[0]
    with torch.no_grad():
        share.alias.mul_(-1.0)
    assert layout.params[2].parameter.tolist() == [-float(i) for i in range(20)]
    layout.params[2].raw_grad.fill_(3.0)
    assert share.raw_grad.tolist() == [3.0] * 20


def test_rounded_parameters_keep_their_exact_values_unless_others_are_written() -> None:
    layout, plan = one_bucket()
    (share,) = shards_of(plan, layout, 1, Wire(parameters=torch.bfloat16))[0]
    exact = share.alias.detach()
    exact.fill_(1.001)
    share.show()
    shown = layout.params[2].parameter
    assert shown.tolist() == [1.0] * 20, "as the others get it"
    share.recall()
    assert torch.equal(exact, torch.full((20,), 1.001))
    with torch.no_grad():
        shown[3] = 2.0  # By the user.
    share.recall()
    assert exact[3] == 2.0
    assert exact[2] == torch.tensor(1.001)


def test_elements_come_in_the_order_of_memory() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    columns = rows.t().contiguous().t()
    assert in_memory(rows, rows).tolist() == [1, 2, 3, 4]
    assert in_memory(rows, columns).tolist() == [1, 3, 2, 4]
    assert in_memory(columns, columns).tolist() == [1, 3, 2, 4]


def test_which_entries_of_a_state_have_a_value_for_each_element() -> None:
    shape, scalar = torch.Size([2]), torch.Size([])
    assert is_per_element("exp_avg", torch.zeros(2), shape)
    assert not is_per_element("step", torch.zeros(()), shape)
    assert not is_per_element("momentum_buffer", None, shape)
    assert is_per_element("exp_avg", torch.zeros(()), scalar), "of a parameter without axes"
    assert not is_per_element("step", torch.zeros(()), scalar)


@pytest.mark.parametrize(("most", "factor"), [(10.0, 1.0), (5.0, 1.0), (2.5, 0.5), (0.0, 0.0)])
def test_gradients_are_clipped_by_the_norm_of_all_ranks_parts(most: float, factor: float) -> None:
    """Parts of (3, 0) and (0, 4) have a norm of 5 together."""
    meeting = Meeting(2)
    made = [one_bucket() for _ in range(2)]  # before threads share one generator

    def each(rank: int) -> tuple[float, list[float]]:
        layout, plan = made[rank]
        ranks = ranks_for(FakeGroup(meeting, rank, None))
        state = ShardedState(ranks, plan, layout, FAILURES, EXACT)
        part = torch.tensor([3.0, 0.0] if rank == 0 else [0.0, 4.0])
        norm = clip(state, [part], most, 2.0, False, device=part.device)
        return norm.item(), part.tolist()

    for rank, (norm, part) in enumerate(as_threads(each, 2)):
        assert norm == pytest.approx(5.0)
        wanted = [3.0 * factor, 0.0] if rank == 0 else [0.0, 4.0 * factor]
        assert part == pytest.approx(wanted, rel=1e-5)


def test_a_norm_that_is_not_finite_is_an_error_if_asked_for() -> None:
    layout, plan = one_bucket()
    ranks = ranks_for(FakeGroup(Meeting(1), 0, None))
    state = ShardedState(ranks, plan, layout, FAILURES, EXACT)
    with pytest.raises(RuntimeError, match="is inf, so they cannot be clipped"):
        clip(state, [torch.tensor([torch.inf])], 1.0, 2.0, True, device=torch.device("cpu"))
