"""Several passes at once: earlier ones come first, and what others wait for is kept."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

from soonest.core.plan import Bucket, Flat, Op, Plan, Slot
from soonest.runtime.execute.pass_queue import PassQueue
from soonest.runtime.execute.pass_state import PassState

FLAT = Flat("float32", 4, 32, (Slot("a", "a", 0, 15), Slot("b", "b", 16, 15)))
BUCKETS = (Bucket(0, 0, 16, "allreduce", ("a",)), Bucket(0, 16, 32, "allreduce", ("b",)))
PLAN = Plan(2, (FLAT,), BUCKETS, (Op(1, "all_reduce"), Op(0, "all_reduce")), window=1)


def new_pass(number: int) -> PassState:
    bound_plan: Any = SimpleNamespace(plan=PLAN, by_need=(0, 1), unfinished=set())
    record: Any = None
    return PassState(number, bound_plan, record)


def queue_of(*passes: PassState) -> PassQueue:
    queue = PassQueue()
    for pass_state in passes:
        queue.add(pass_state)
    return queue


def close(pass_state: PassState) -> None:
    pass_state.arrived([0, 1])
    pass_state.closed = True


def run_op(queue: PassQueue) -> tuple[int, int] | None:
    """Number of the pass, and the op that was done."""
    found = queue.next_op()
    if found is None:
        return None
    pass_state, op = found
    pass_state.issue_op()
    assert queue.in_flight is pass_state
    pass_state.complete_op()
    assert queue.in_flight is None
    return pass_state.number, op


def test_ops_of_an_earlier_pass_come_first() -> None:
    first, second = new_pass(0), new_pass(1)
    queue = queue_of(first, second)
    assert (first.superseded, second.superseded) == (True, False)
    close(second)
    assert queue.next_op() is None, "the other ranks send those of the first one before"
    close(first)
    assert [run_op(queue) for _ in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), None]


def test_updates_come_pass_by_pass_and_what_is_finished_is_forgotten() -> None:
    first, second = new_pass(0), new_pass(1)
    queue = queue_of(first, second)
    close(first)
    close(second)
    while run_op(queue):
        pass
    first.step = second.step = object()
    updated: list[tuple[int, int]] = []
    while (found := queue.next_update()) is not None:
        pass_state, bucket = found
        pass_state.complete_update(bucket)
        updated.append((pass_state.number, bucket))
    assert updated == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(queue) == []
    assert first.bound_plan.unfinished == second.bound_plan.unfinished == set()


def test_a_pass_is_unsettled_until_the_training_loop_has_to_go_on() -> None:
    pass_state = new_pass(0)
    queue = queue_of(pass_state)
    assert queue.unsettled is None
    close(pass_state)
    assert queue.unsettled is pass_state
    run_op(queue)
    run_op(queue)
    assert queue.unsettled is None
    pass_state.step = object()
    assert queue.unsettled is pass_state


def test_what_others_wait_for_is_kept_alive() -> None:
    pass_state = new_pass(0)
    queue = queue_of(pass_state)
    pass_state.bound_plan.unfinished.clear()  # as if its training were dropped
    close(pass_state)
    queue.note_owing()
    kept = weakref.ref(pass_state)
    del pass_state
    gc.collect()
    assert kept() is not None
    run_op(queue)
    run_op(queue)
    queue.note_owing()
    gc.collect()
    assert kept() is None
    assert list(queue) == []


def test_where_the_training_loop_is() -> None:
    queue = PassQueue()
    assert queue.where() == "not in a step"
    pass_state = new_pass(7)
    queue.add(pass_state)
    assert queue.where() == "in the backward pass of step 7"
    close(pass_state)
    assert queue.where() == "between the backward pass and optimizer.step() of step 7"
    pass_state.step = object()
    assert queue.where() == "behind optimizer.step() of step 7"
