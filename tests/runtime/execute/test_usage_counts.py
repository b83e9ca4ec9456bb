"""Who has used what, and what a bound plan makes of flat buffers, by numbers written by hand."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from helpers.fake_ranks import FakeGroup, Meeting, ranks_for
from soonest.core.plan import Bucket, Op, Plan
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.optim.bucket_update import Updater


class Model(nn.Module):
    """Three parameters of 15 elements: with their counts they lie 16 apart."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abc":
            self.register_parameter(name, nn.Parameter(torch.zeros(15)))


BORDERS = (0, 8, 32, 48)
"""The first parameter is cut in the middle."""


def bound(method: str = "allreduce", *, order: tuple[int, ...] = (2, 0, 1)) -> BoundPlan:
    model = Model()
    layout = FlatBuffers(model)
    (flat,) = layout.flats
    assert [slot.start for slot in flat.slots] == [0, 16, 32]
    buckets = tuple(
        Bucket(0, start, stop, method, ("(root)",)) for start, stop in pairwise(BORDERS)
    )
    kinds = {"allreduce": ["all_reduce"], "shard_direct": ["reduce_scatter"]}[method]
    ops = [Op(bucket, kind) for bucket in order for kind in kinds]
    state: Any = None
    if method != "allreduce":
        ops += [Op(bucket, "all_gather_parameters") for bucket in order]
        state = SimpleNamespace(shares=[[], [], []])
    plan = Plan(1, layout.flats, buckets, tuple(ops), window=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ranks = ranks_for(FakeGroup(Meeting(1), 0, None), FakeGroup(Meeting(1), 0, None))
    return BoundPlan(
        plan, layout, ranks, Updater(optimizer, torch.optim.SGD, layout.params), state=state
    )


def pass_of(plan: BoundPlan) -> PassState:
    record: Any = None
    return PassState(0, plan, record)


def run(plan: BoundPlan, pass_state: PassState, op: int) -> None:
    running = plan.issue(pass_state, op)
    while running.work is not None:
        running.work.wait()
        running.go_on()


def gradient(plan: BoundPlan, order: int) -> Tensor:
    return plan.layout.params[order].raw_grad


def test_where_parameters_lie() -> None:
    plan = bound(order=(2, 0, 1))
    assert plan.buckets_of == [[0, 1], [1], [2]]
    assert plan.last_of == [1, 1, 2], "of the first parameter's two, the one that is sent last"
    assert [[p.order for p in waiting] for waiting in plan.awaiting] == [[], [0, 1], [2]]
    other = bound(order=(2, 1, 0))
    assert other.last_of == [0, 1, 2]
    assert [[p.order for p in waiting] for waiting in other.awaiting] == [[0], [1], [2]]


def test_what_is_needed_first_comes_first() -> None:
    assert bound(order=(2, 0, 1)).by_need == [1, 2, 0], "nobody waits for bucket 0"
    assert bound(order=(2, 1, 0)).by_need == [0, 1, 2]


def test_behind_each_gradient_stands_who_has_it() -> None:
    plan = bound()
    pass_state = pass_of(plan)
    pass_state.unused = {1}
    for op in range(3):
        run(plan, pass_state, op)
    assert [plan.usage.users_of(param) for param in plan.layout.params] == [1, 0, 1]
    assert [plan.usage.used_anywhere(param) for param in plan.layout.params] == [True, False, True]


def test_what_one_of_many_ranks_has_used_is_used() -> None:
    plan = bound()
    param = plan.layout.params[0]
    for count, used in ((0.0, False), (2.0**-12, False), (300 * 2.0**-12, False), (1.0, True)):
        plan.layout.grads[0][param.slot.count_at] = count
        assert plan.usage.used_anywhere(param) is used


def test_a_gradient_from_before_stays_unless_a_rank_has_used_the_parameter() -> None:
    plan = bound(order=(2, 1, 0))
    pass_state = pass_of(plan)
    own = torch.full((15,), 7.0)
    pass_state.kept = {1: own, 2: own}
    for order in range(3):
        gradient(plan, order).fill_(3.0)
    for op in range(3):
        run(plan, pass_state, op)
    assert gradient(plan, 1).tolist() == [7.0] * 15, "no rank's pass has used it"
    assert not plan.usage.used_anywhere(plan.layout.params[1])
    plan.layout.grads[0][plan.layout.params[2].slot.count_at] = 1.0
    gradient(plan, 2).fill_(3.0)
    plan.put_back(pass_state, 2)
    assert gradient(plan, 2).tolist() == [3.0] * 15, "another rank's has"
    assert gradient(plan, 0).tolist() == [3.0] * 15


def test_negative_zeros_are_a_sign_and_no_values() -> None:
    """A rank whose gradient happens to be a negative zero has one all the same."""
    plan = bound("shard_direct")
    pass_state = pass_of(plan)
    pass_state.unused = {1}
    gradient(plan, 0).fill_(-0.0)
    gradient(plan, 2)[0] = 5.0
    for op in range(3):
        run(plan, pass_state, op)
    signs = [bool(torch.signbit(gradient(plan, order)[0])) for order in range(3)]
    assert signs == [False, True, False]
    assert not torch.signbit(gradient(plan, 0)[8]), "the part in the second bucket, too"
    assert gradient(plan, 2)[0] == 5.0
