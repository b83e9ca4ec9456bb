"""What the state of a pass promises is done before the state says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from soonest.core.plan import Bucket, Flat, Op, Plan, Slot
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.execute.pass_state import GATHERED, UPDATED, BucketState, PassState

FLAT = Flat("float32", 4, 16, (Slot("a", "a", 0, 15),))
KINDS = {"allreduce": ("all_reduce",), "shard_direct": ("reduce_scatter", "all_gather_parameters")}


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_gradient_is_zeroed_before_anybody_may_read_it(method: str, zeroed: bool) -> None:
    seen: list[BucketState] = []

    class Gradient:
        def zero_(self) -> None:
            seen.append(pass_state.states[0])

    ops = tuple(Op(0, kind) for kind in KINDS[method])
    bound_plan = object.__new__(BoundPlan)  # without buffers, as nothing is sent
    bound_plan.plan = Plan(2, (FLAT,), (Bucket(0, 0, 16, method, ("a",)),), ops)
    param: Any = SimpleNamespace(order=0, raw_grad=Gradient())
    bound_plan.awaiting, bound_plan.by_need = [[param]], [0]
    record: Any = None
    pass_state = PassState(0, bound_plan, record)
    pass_state.arrived([0])
    pass_state.issue_op()
    bound_plan.complete_op(pass_state)
    pass_state.step = SimpleNamespace(zeroed={0} if zeroed else set())
    bound_plan.complete_update(pass_state, 0)
    if bound_plan.plan.sharded:
        assert seen == [], "the parameter is not whole"
        pass_state.issue_op()
        bound_plan.complete_op(pass_state)
    assert pass_state.states == [GATHERED if bound_plan.plan.sharded else UPDATED]
    assert seen == ([BucketState(pass_state.final - 1)] if zeroed else [])


def test_a_bound_plan_says_what_it_is() -> None:
    bound_plan = object.__new__(BoundPlan)
    bucket = Bucket(0, 0, 16, "allreduce", ("a",))
    bound_plan.plan = Plan(2, (FLAT,), (bucket,), (Op(0, "all_reduce"),))
    bound_plan.unfinished = set()
    assert repr(bound_plan) == (
        f"<BoundPlan {bound_plan.plan.fingerprint}: 1 buckets, 1 ops, 2 ranks, 0 unfinished passes>"
    )
