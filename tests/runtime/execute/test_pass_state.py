"""The rules of a pass: which op may be issued, which update comes next, what nothing may skip."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from soonest.core.plan import Bucket, Flat, Op, Plan, Slot
from soonest.errors import SoonestError
from soonest.runtime.execute.pass_state import (
    GATHERED,
    READY,
    REDUCED,
    REDUCING,
    UPDATED,
    WAITING,
    PassState,
)

# Four parameters of 15 elements, each with its count behind it: bucket n carries parameter n.
FLAT = Flat("float32", 4, 64, tuple(Slot(name, name, 16 * i, 15) for i, name in enumerate("abcd")))


def plan(*ops: Op, method: str = "allreduce", window: int = 2) -> Plan:
    buckets = tuple(
        Bucket(0, 16 * i, 16 * i + 16, method, (name,)) for i, name in enumerate("abcd")
    )
    return Plan(2, (FLAT,), buckets, ops, window)


def reduce(*buckets: int) -> list[Op]:
    return [Op(bucket, "all_reduce") for bucket in buckets]


LAST_FIRST = plan(*reduce(3, 2, 1, 0))
SHARDED = plan(
    *(Op(bucket, "reduce_scatter") for bucket in (3, 2, 1, 0)),
    *(Op(bucket, "all_gather_parameters") for bucket in (0, 1, 2, 3)),
    method="shard_direct",
)


def pass_through(
    plan: Plan, *, by_need: tuple[int, ...] = (0, 1, 2, 3), number: int = 7, local: bool = False
) -> PassState:
    bound_plan: Any = SimpleNamespace(plan=plan, by_need=by_need)
    record: Any = None
    pass_state = PassState(number, bound_plan, record, local=local)
    pass_state.validate()
    return pass_state


def issue(pass_state: PassState) -> int:
    """The bucket of the op that is issued now."""
    op = pass_state.next_op()
    assert op is not None
    pass_state.issue_op()
    pass_state.validate()
    return pass_state.plan.ops[op].bucket


def complete(pass_state: PassState, ops: int = 1) -> None:
    for _ in range(ops):
        pass_state.complete_op()
        pass_state.validate()


def all_arrive(pass_state: PassState) -> None:
    for bucket in (3, 2, 1, 0):
        assert pass_state.arrived([bucket])
        pass_state.validate()
    pass_state.closed = True


def reduce_all(pass_state: PassState) -> list[int]:
    """The buckets in the order in which their ops were issued, one at a time."""
    order: list[int] = []
    while pass_state.next_op() is not None:
        order.append(issue(pass_state))
        complete(pass_state)
    return order


# Ready


def test_a_bucket_is_ready_when_all_that_it_carries_is_there() -> None:
    """Parameter b reaches into bucket 1, so that both buckets have to wait for it."""
    slots = (Slot("a", "a", 0, 15), Slot("b", "b", 16, 31))
    flat = Flat("float32", 4, 48, slots)
    buckets = (Bucket(0, 0, 32, "allreduce", ("a", "b")), Bucket(0, 32, 48, "allreduce", ("b",)))
    pass_state = pass_through(Plan(2, (flat,), buckets, tuple(reduce(1, 0))), by_need=(0, 1))
    assert pass_state.states == [WAITING, WAITING]
    assert pass_state.arrived([0, 1])
    assert pass_state.states == [WAITING, READY]
    pass_state.validate()
    assert pass_state.arrived([0])
    assert pass_state.states == [READY, READY]


def test_a_bucket_with_a_gradient_missing_is_not_ready() -> None:
    flat = Flat("float32", 4, 32, (Slot("a", "a", 0, 15), Slot("b", "b", 16, 15)))
    buckets = (Bucket(0, 0, 32, "allreduce", ("a", "b")),)
    pass_state = pass_through(Plan(2, (flat,), buckets, tuple(reduce(0))), by_need=(0,))
    assert not pass_state.arrived([0])
    assert pass_state.next_op() is None
    assert pass_state.arrived([0])
    assert pass_state.next_op() == 0


# Ops


def test_ops_are_issued_in_the_order_of_the_plan_whatever_is_ready_first() -> None:
    pass_state = pass_through(plan(*reduce(2, 3, 0, 1)))
    pass_state.arrived([3])
    assert pass_state.next_op() is None, "bucket 2 comes before it"
    pass_state.arrived([2])
    assert issue(pass_state) == 2
    complete(pass_state)
    assert issue(pass_state) == 3
    complete(pass_state)
    pass_state.arrived([1])
    assert pass_state.next_op() is None, "bucket 0 comes before it"
    pass_state.arrived([0])
    assert reduce_all(pass_state) == [0, 1]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_as_many_ops_are_in_flight_as_the_window_says_and_not_one_more(window: int) -> None:
    pass_state = pass_through(plan(*reduce(3, 2, 1, 0), window=window))
    all_arrive(pass_state)
    for _ in range(window):
        issue(pass_state)
    assert pass_state.in_flight == window
    assert pass_state.next_op() is None
    complete(pass_state)
    issue(pass_state)
    assert pass_state.next_op() is None


def test_none_is_issued_behind_an_op_that_is_to_be_alone() -> None:
    ops = [Op(3, "all_reduce"), Op(2, "all_reduce", alone=True), *reduce(1, 0)]
    pass_state = pass_through(plan(*ops, window=4))
    all_arrive(pass_state)
    assert issue(pass_state) == 3
    assert issue(pass_state) == 2, "what is in flight before it does not matter"
    assert pass_state.next_op() is None
    complete(pass_state)
    assert pass_state.next_op() is None, "that was the one before it"
    complete(pass_state)
    assert [issue(pass_state), issue(pass_state)] == [1, 0]


def test_an_op_waits_for_the_one_before_it_of_the_same_bucket() -> None:
    flat = Flat("float32", 4, 16, (Slot("a", "a", 0, 15),))
    kinds = ("reduce_inside", "all_reduce_across", "all_gather_inside")
    buckets = (Bucket(0, 0, 16, "hierarchical", ("a",)),)
    ops = tuple(Op(0, kind) for kind in kinds)
    pass_state = pass_through(Plan(4, (flat,), buckets, ops, window=3), by_need=(0,))
    pass_state.arrived([0])
    for expected in (REDUCING, REDUCING, REDUCED):
        issue(pass_state)
        assert pass_state.next_op() is None
        assert pass_state.states == [REDUCING]
        complete(pass_state)
        assert pass_state.states == [expected]


# Updates


def test_the_first_needed_of_what_is_reduced_is_updated_next() -> None:
    pass_state = pass_through(LAST_FIRST, by_need=(2, 0, 3, 1))
    all_arrive(pass_state)
    order = reduce_all(pass_state)
    assert order == [3, 2, 1, 0]
    assert pass_state.next_update() is None, "nobody has called step()"
    pass_state.step = object()
    updated: list[int] = []
    while (bucket := pass_state.next_update()) is not None:
        assert not pass_state.finished
        pass_state.complete_update(bucket)
        pass_state.validate()
        updated.append(bucket)
    assert updated == [2, 0, 3, 1]
    assert pass_state.finished
    assert pass_state.settled


def test_what_is_not_reduced_is_not_updated() -> None:
    pass_state = pass_through(LAST_FIRST)
    all_arrive(pass_state)
    pass_state.step = object()
    issue(pass_state)
    issue(pass_state)
    complete(pass_state)
    assert pass_state.next_update() == 3
    pass_state.complete_update(3)
    assert pass_state.next_update() is None
    complete(pass_state)
    assert pass_state.next_update() == 2


# Sharded


def test_a_sharded_pass_ends_when_all_parts_are_gathered() -> None:
    pass_state = pass_through(SHARDED)
    all_arrive(pass_state)
    assert reduce_all(pass_state) == [3, 2, 1, 0]
    assert pass_state.next_op() is None, "nothing is updated"
    pass_state.step = object()
    pass_state.complete_update(1)
    assert pass_state.next_op() is None, "bucket 0 comes before it"
    pass_state.complete_update(0)
    assert [issue(pass_state), issue(pass_state)] == [0, 1]
    assert pass_state.states[:2] == [UPDATED, UPDATED]
    complete(pass_state, 2)
    assert pass_state.states == [GATHERED, GATHERED, REDUCED, REDUCED]
    for bucket in (2, 3):
        assert pass_state.next_update() == bucket
        pass_state.complete_update(bucket)
        issue(pass_state)
        assert not pass_state.finished
        complete(pass_state)
    assert pass_state.finished
    assert set(pass_state.states) == {pass_state.final} == {GATHERED}


def test_a_pass_that_is_not_sharded_ends_when_all_is_updated() -> None:
    assert pass_through(LAST_FIRST).final is UPDATED


# Without gradients, and without an update


def test_a_local_pass_only_updates() -> None:
    pass_state = pass_through(LAST_FIRST, local=True)
    assert set(pass_state.states) == {REDUCED}
    assert pass_state.closed
    assert not pass_state.owes
    assert pass_state.next_op() is None
    pass_state.step = object()
    for bucket in (0, 1, 2, 3):
        assert pass_state.next_update() == bucket
        pass_state.complete_update(bucket)
    pass_state.validate()
    assert pass_state.finished


def test_a_local_pass_of_a_sharded_plan_gathers() -> None:
    pass_state = pass_through(SHARDED, local=True)
    pass_state.step = object()
    assert pass_state.owes, "the others wait for this rank's parts"
    for bucket in (0, 1, 2, 3):
        pass_state.complete_update(bucket)
    assert reduce_all(pass_state) == [0, 1, 2, 3]
    assert not pass_state.owes
    assert pass_state.finished


@pytest.mark.parametrize("which", [LAST_FIRST, SHARDED])
def test_a_superseded_pass_without_a_step_is_finished_when_it_is_reduced(which: Plan) -> None:
    pass_state = pass_through(which)
    all_arrive(pass_state)
    pass_state.superseded = True
    assert not pass_state.finished
    assert reduce_all(pass_state) == [3, 2, 1, 0]
    assert pass_state.finished
    assert pass_state.next_update() is None


def test_a_superseded_pass_with_a_step_goes_on_to_its_end() -> None:
    pass_state = pass_through(SHARDED)
    all_arrive(pass_state)
    pass_state.step = object()
    pass_state.superseded = True
    reduce_all(pass_state)
    assert not pass_state.finished
    for bucket in (0, 1, 2, 3):
        pass_state.complete_update(bucket)
    assert reduce_all(pass_state) == [0, 1, 2, 3]
    assert pass_state.finished


# What others wait for


def test_a_pass_owes_its_ops_from_the_end_of_backward_on() -> None:
    pass_state = pass_through(SHARDED)
    assert not pass_state.owes
    assert pass_state.settled, "the training loop has something to do first"
    all_arrive(pass_state)
    assert pass_state.owes
    assert not pass_state.settled
    reduce_all(pass_state)
    assert not pass_state.owes
    assert pass_state.settled, "until step() is called"
    assert not pass_state.finished
    pass_state.step = object()
    assert pass_state.owes
    assert not pass_state.settled


def test_an_update_is_owed_to_nobody() -> None:
    pass_state = pass_through(LAST_FIRST)
    all_arrive(pass_state)
    pass_state.step = object()
    reduce_all(pass_state)
    assert not pass_state.owes
    assert not pass_state.finished


# What nothing may skip


def test_a_state_that_is_skipped_is_an_error_that_tells_what_happened() -> None:
    pass_state = pass_through(LAST_FIRST)
    all_arrive(pass_state)
    issue(pass_state)
    with pytest.raises(SoonestError) as found:
        pass_state.complete_update(3)
    assert str(found.value) == (
        "step 7: bucket 3 (0.00 MB of d) cannot go from REDUCING to UPDATED. This is a mistake in "
        "soonest: please report it with this message. Until now: WAITING to READY (bucket 3), "
        "WAITING to READY (bucket 2), WAITING to READY (bucket 1), WAITING to READY (bucket 0), "
        "READY to REDUCING (bucket 3). It is <PassState: step 7, of 4 ops 1 issued and 0 "
        "completed, buckets 0-2 READY, 3 REDUCING>"
    )
    assert pass_state.states[3] is REDUCING
    pass_state.validate()


def test_the_story_is_that_of_the_last_twenty_events() -> None:
    pass_state = pass_through(SHARDED)
    all_arrive(pass_state)
    reduce_all(pass_state)
    pass_state.step = object()
    for bucket in (0, 1, 2, 3):
        pass_state.complete_update(bucket)
    reduce_all(pass_state)
    with pytest.raises(SoonestError, match="from GATHERED to UPDATED") as found:
        pass_state.complete_update(0)
    told = str(found.value)
    assert told.count(" (bucket ") == 20, "of the 4 * 5 that there were"
    assert "Until now: WAITING to READY (bucket 3)," in told
    assert "UPDATED to GATHERED (bucket 3). It is" in told


@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_is_done_twice(sharded: bool) -> None:
    pass_state = pass_through(SHARDED if sharded else LAST_FIRST)
    pass_state.arrived([3])
    with pytest.raises(SoonestError, match=r"bucket 3 .* cannot go from READY to READY"):
        pass_state.arrived([3])
    pass_state = pass_through(SHARDED if sharded else LAST_FIRST, local=True)
    pass_state.step = object()
    pass_state.complete_update(2)
    with pytest.raises(SoonestError, match=r"bucket 2 .* cannot go from UPDATED to UPDATED"):
        pass_state.complete_update(2)


def test_an_op_of_a_bucket_that_is_not_ready_cannot_be_issued() -> None:
    pass_state = pass_through(LAST_FIRST)
    with pytest.raises(SoonestError, match=r"from WAITING to REDUCING.* now: nothing\."):
        pass_state.issue_op()
    assert pass_state.issued == 0


def test_only_a_sharded_pass_gathers() -> None:
    pass_state = pass_through(LAST_FIRST, local=True)
    pass_state.complete_update(0)
    with pytest.raises(SoonestError, match=r"bucket 0 .* cannot go from UPDATED to GATHERED"):
        pass_state._move(0, GATHERED)


# Any order of events


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("which", [LAST_FIRST, SHARDED])
def test_counts_and_states_agree_whatever_comes_when(which: Plan, seed: int) -> None:
    chance = random.Random(seed)
    pass_state = pass_through(which, by_need=tuple(chance.sample(range(4), 4)))
    late = chance.sample(range(4), 4)
    for _ in range(1000):
        ways: list[Any] = []
        if late:
            ways.append(lambda: pass_state.arrived([late.pop()]))
        elif pass_state.step is None:
            ways.append(lambda: setattr(pass_state, "step", object()))
        if pass_state.next_op() is not None:
            ways.append(pass_state.issue_op)
        if pass_state.in_flight:
            ways.append(pass_state.complete_op)
        if (bucket := pass_state.next_update()) is not None:
            ways.append(lambda bucket=bucket: pass_state.complete_update(bucket))
        if not ways:
            break
        chance.choice(ways)()
        pass_state.closed = not late
        pass_state.validate()
    assert pass_state.finished
    assert set(pass_state.states) == {pass_state.final}


@pytest.mark.parametrize("broken", ["_missing", "states", "issued", "completed", "_left"])
def test_a_contradiction_between_counts_and_states_is_found(broken: str) -> None:
    pass_state = pass_through(LAST_FIRST)
    all_arrive(pass_state)
    issue(pass_state)
    wrong = {"_missing": [0, 0, 0, 1], "states": [READY] * 4}.get(broken, 2)
    setattr(pass_state, broken, wrong)
    with pytest.raises(AssertionError):
        pass_state.validate()
