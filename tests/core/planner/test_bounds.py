"""The bound: cases worked out by hand, and an exhaustive search over tiny models."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soonest.core.cost import Cost, Network
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.trace import Layer, Trace

ONE_BYTE_PER_S = Network.linear(0.0, 1.0)


def model(*layers: tuple[int, int, int]) -> Trace:
    """A trace of layers given as seconds of transfer, forward and backward."""
    return Trace(
        "t", tuple(Layer(str(i), p, f * 1e6, b * 1e6) for i, (p, f, b) in enumerate(layers))
    )


@pytest.mark.parametrize(
    ("trace", "seconds"),
    [
        (model((0, 2, 3)), 5),
        (model((1, 2, 3)), 6),
        (model((1, 2, 3), (1, 2, 3)), 11),
        (model((1, 2, 3), (20, 2, 3)), 26),
        (model((20, 2, 3), (1, 2, 3)), 30),
        (model((1, 2, 3), (0, 9, 9)), 24),
    ],
)
def test_by_hand(trace: Trace, seconds: float):
    assert lower_bound_s(trace, ONE_BYTE_PER_S) == pytest.approx(seconds)


def test_the_latency_of_one_transfer_cannot_be_hidden():
    trace = model((20, 2, 3), (1, 2, 3))
    late = lower_bound_s(trace, Network.linear(7.0, 1.0))
    assert late == lower_bound_s(trace, ONE_BYTE_PER_S) + 7.0


def test_nothing_to_send_needs_no_latency():
    assert lower_bound_s(model((0, 2, 3)), Network.linear(7.0, 1.0)) == 5.0


def test_updates_follow_the_backward_pass_one_by_one():
    layers = (("a", 1, 2.0, 3.0), ("b", 3, 2.0, 3.0))
    trace = Trace(
        "t", tuple(Layer(n, size, f * 1e6, b * 1e6) for n, size, f, b in layers), update_us=40e6
    )
    assert lower_bound_s(trace, ONE_BYTE_PER_S) == 6 + 40 + 2


def shortest_step_s(trace: Trace, latency_s: int = 0) -> float:
    """The shortest step of all preemptive schedules, second by second."""
    ready, tail = [at + latency_s for at in trace.ready_s()], trace.tail_s()
    jobs = range(len(trace.layers))

    @cache
    def best(now: int, left: tuple[int, ...]) -> float:
        """Shortest end of the forward pass over what is left to transfer."""
        if not any(left):
            return 0.0
        ends = [best(now + 1, left)] if now < ready[0] - 1e-9 else []  # Idle, if it may help.
        for i in jobs:
            if left[i] and ready[i] <= now + 1e-9:
                rest = (*left[:i], left[i] - 1, *left[i + 1 :])
                there = now + 1 + tail[i] if not rest[i] else 0.0
                ends.append(max(there, best(now + 1, rest)))
        return min(ends)

    there = best(0, tuple(layer.bytes for layer in trace.layers))
    return max(there, trace.forward_s + trace.backward_s)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4
    ),
    st.integers(0, 2),
)
def test_the_bound_is_the_best_preemptive_schedule(
    layers: list[tuple[int, int, int]], latency_s: int
):
    trace = model(*layers)
    bound = lower_bound_s(trace, Network.linear(latency_s, 1.0))
    assert bound == pytest.approx(shortest_step_s(trace, latency_s))


def test_where_plans_may_shard_or_not_the_bound_is_that_of_the_better_way():
    trace = model((20, 2, 3), (1, 2, 3))
    costs = {
        "all_reduce": Cost.linear(0.0, 1.0),
        "ring_reduce_scatter": Cost.linear(0.0, 0.1),
        "all_gather_parameters": Cost.linear(0.0, 0.1),
    }
    network = Network(costs)
    alone = {m: lower_bound_s(trace, network, methods=[m]) for m in ("allreduce", "shard")}
    assert alone["allreduce"] < alone["shard"]
    assert lower_bound_s(trace, network) == alone["allreduce"]
