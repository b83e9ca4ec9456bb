"""The simulated step: cases worked out by hand, and what holds for every plan."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies
from soonest.core.bounds import lower_bound_s
from soonest.core.network import Cost, Network
from soonest.core.plan import METHODS, Bucket, Flat, Op, Plan
from soonest.core.planner import first_plan, flats_of, make_plan
from soonest.core.simulate import simulate, step_time_s
from soonest.core.timeline import Timeline
from soonest.core.trace import Layer, Trace

UNIT_BYTES = 64
"""What one second transfers in the cases below: exactly one aligned parameter of 15 floats."""


def model(*layers: tuple[int, float, float], update_s: float = 0.0) -> Trace:
    """A trace of layers given as seconds of transfer, forward and backward."""
    return Trace(
        "hand-made",
        tuple(
            Layer(f"l{i}", max(0, size * UNIT_BYTES - 4), fwd * 1e6, bwd * 1e6)
            for i, (size, fwd, bwd) in enumerate(layers)
        ),
        update_us=update_s * 1e6,
    )


def plan_of(trace: Trace, order: Sequence[int], *, fused: int = 1, window: int = 1) -> Plan:
    """A plan with one bucket per parameter, the first ``fused`` of them in one."""
    flats = flats_of(trace)
    slots = flats[0].slots
    cuts = [0, *(slot.start for slot in slots[fused:]), flats[0].numel]
    layers = [tuple(s.layer for s in slots[:fused]), *((s.layer,) for s in slots[fused:])]
    buckets = tuple(
        Bucket(0, cuts[i], cuts[i + 1], "allreduce", names) for i, names in enumerate(layers)
    )
    return Plan(2, flats, buckets, tuple(Op(i, "all_reduce") for i in order), window)


def network(latency_s: float = 0.0) -> Network:
    return Network.linear(latency_s, UNIT_BYTES)


def sends(timeline: Timeline) -> list[tuple[float, float]]:
    return [(round(span.start_s, 9), round(span.end_s, 9)) for span in timeline.of("send")]


def on(timeline: Timeline, *kinds) -> list[tuple[str, str, float, float]]:
    return [(s.kind, s.name, s.start_s, s.end_s) for s in timeline.of(*kinds)]


def test_the_last_layer_is_sent_while_the_first_still_computes():
    trace = model((1, 2, 3), (4, 1, 1))
    timeline = simulate(trace, plan_of(trace, [1, 0]), network(), title="by hand")
    assert timeline.title == "by hand"
    assert sends(timeline) == [(1, 5), (5, 6)]
    assert on(timeline, "backward", "wait", "forward") == [
        ("backward", "l1", 0, pytest.approx(1)),
        ("backward", "l0", pytest.approx(1), pytest.approx(4)),
        ("wait", "l0", pytest.approx(4), pytest.approx(6)),
        ("forward", "l0", pytest.approx(6), pytest.approx(8)),
        ("forward", "l1", pytest.approx(8), pytest.approx(9)),
    ]
    assert timeline.step_s == pytest.approx(9)


def test_ops_keep_their_order_even_if_that_idles_the_network():
    trace = model((1, 2, 3), (4, 1, 1))
    timeline = simulate(trace, plan_of(trace, [0, 1]), network())
    assert sends(timeline) == [(4, 5), (5, 9)]
    assert timeline.step_s == pytest.approx(10)


def several_ops(method: str, trace: Trace, jobs: Sequence[tuple[int, int]]) -> Plan:
    """A plan with one bucket per layer; ``jobs`` are bucket and number of the op."""
    plain = plan_of(trace, range(len(trace.layers)))
    buckets = tuple(replace(bucket, method=method) for bucket in plain.buckets)
    ops = tuple(Op(bucket, METHODS[method][stage]) for bucket, stage in jobs)
    return replace(plain, buckets=buckets, ops=ops, window=2)


def slow_ops() -> Network:
    """Every op takes half a second a unit, and half a second of latency."""
    kinds = {kind for kinds in METHODS.values() for kind in kinds}
    return Network({kind: Cost.linear(0.5, 2 * UNIT_BYTES) for kind in kinds})


def test_a_second_op_waits_for_the_first_of_its_bucket():
    trace = model((2, 1, 1), (4, 1, 1))
    jobs = [(1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (0, 2)]
    timeline = simulate(trace, several_ops("hierarchical", trace, jobs), slow_ops())
    # Latencies of 0.5 s are part of the spans, and pass while others transfer.
    assert sends(timeline)[:4] == [(1, 3.5), (3, 4.5), (4, 6.5), (6, 7.5)]
    chained = several_ops("hierarchical", trace, sorted(jobs, key=lambda job: -job[0]))
    assert step_time_s(trace, chained, slow_ops()) > timeline.step_s


def test_parameters_are_shared_after_the_update_of_a_part():
    """Each of two ranks updates a half of each layer: 128 and 256 of all 376 bytes, in 24 s."""
    trace = model((2, 1, 1), (4, 1, 5), update_s=24)
    plan = several_ops("shard", trace, [(1, 0), (0, 0), (0, 1), (1, 1)])
    timeline = simulate(trace, plan, slow_ops())
    parts = [24 / 2 * size / 376 for size in (128, 256)]
    # l1 is ready at 5, issued then and combined at 5 + 0.5 + 2. l0 is ready at 6, and so is issued
    # within the window; it transfers for 1 s behind l1, until 8.5. Meanwhile l1 is being updated.
    first, second = 7.5 + parts[1], 7.5 + parts[1] + parts[0]
    assert on(timeline, "update") == [
        ("update", plan.describe(1), pytest.approx(7.5), pytest.approx(first)),
        ("update", plan.describe(0), pytest.approx(first), pytest.approx(second)),
    ]
    # l0 is shared first, as planned: 0.5 s of latency, 1 s of transfer; l1 has 2 s behind it. The
    # backward pass ended at 6, and each layer's forward takes 1 s.
    shared = [second + 1.5, second + 3.5]
    assert [end for _, end in sends(timeline)] == pytest.approx([7.5, 8.5, *shared])
    assert on(timeline, "wait") == [
        ("wait", "l0", pytest.approx(6), pytest.approx(shared[0])),
        ("wait", "l1", pytest.approx(shared[0] + 1), pytest.approx(shared[1])),
    ]
    assert timeline.step_s == pytest.approx(shared[1] + 1)


@pytest.mark.parametrize(("window", "ends"), [(1, [4, 7, 10]), (2, [4, 5, 7]), (3, [4, 5, 6])])
def test_latencies_of_ops_in_flight_overlap(window: int, ends: list[float]):
    """Two seconds of latency and one of transfer each, all ready after one second."""
    trace = model((1, 0, 0), (1, 0, 0), (1, 0, 1))
    plan = plan_of(trace, [0, 1, 2], window=window)
    assert [end for _, end in sends(simulate(trace, plan, network(2.0)))] == pytest.approx(ends)


def test_a_latency_is_hidden_behind_a_longer_transfer():
    trace = model((1, 0, 0), (3, 0, 0))
    plan = plan_of(trace, [1, 0], window=2)
    assert sends(simulate(trace, plan, network(2.0))) == [(0, 5), (3, 6)]


def test_no_latency_passes_before_the_op_in_front_is_issued():
    """l1 is ready at 1 s, but behind l0 in the order, which is ready at 4 s."""
    trace = model((1, 0, 3), (4, 0, 1))
    plain = plan_of(trace, [0, 1], window=2)
    buckets = (plain.buckets[0], replace(plain.buckets[1], method="gather"))
    ops = (Op(0, "all_reduce"), Op(1, "all_gather"))
    kinds = {"all_reduce": Cost.linear(0.5, UNIT_BYTES), "all_gather": Cost.linear(9.0, UNIT_BYTES)}
    timeline = simulate(trace, Plan(2, plain.flats, buckets, ops, 2), Network(kinds))
    # l0: issued at 4, transfers from 4.5 to 5.5. l1: issued at 4, too, transfers from 13 to 17.
    assert sends(timeline) == [(4, 5.5), (4, 17)]


def test_nothing_is_issued_behind_an_op_that_flies_alone():
    trace = model((1, 0, 0), (1, 0, 0), (1, 0, 1))
    plan = plan_of(trace, [2, 0, 1], window=2)
    first, urgent, last = plan.ops
    alone = replace(plan, ops=(first, replace(urgent, alone=True), last))
    assert sends(simulate(trace, plan, network(2.0))) == [(1, 4), (2, 5), (4, 7)]
    assert sends(simulate(trace, alone, network(2.0))) == [(1, 4), (2, 5), (5, 8)]


def test_a_bucket_waits_for_the_gradients_of_all_its_layers():
    trace = model((1, 1, 5), (1, 1, 1), (1, 1, 1))
    timeline = simulate(trace, plan_of(trace, [1, 0], fused=2), network())
    assert sends(timeline) == [(1, 2), (7, 9)]
    assert timeline.step_s == pytest.approx(12)


def test_a_layer_waits_for_all_its_buckets():
    trace = model((2, 1, 1), (1, 1, 1))
    flats = flats_of(trace)
    cut_in_two = tuple(
        Bucket(0, 16 * i, 16 * i + 16, "allreduce", (name,))
        for i, name in enumerate(("l0", "l0", "l1"))
    )
    plan = Plan(2, flats, cut_in_two, tuple(Op(i, "all_reduce") for i in (0, 2, 1)), window=1)
    timeline = simulate(trace, plan, network())
    assert on(timeline, "wait") == [("wait", "l0", pytest.approx(2), pytest.approx(5))]


def test_no_update_starts_before_the_backward_pass_ends():
    trace = model((1, 1, 10), (1, 1, 1), update_s=3.0)
    timeline = simulate(trace, plan_of(trace, [1, 0]), network())
    assert on(timeline, "update") == [
        ("update", "l1", pytest.approx(11), pytest.approx(12.5)),
        ("update", "l0", pytest.approx(12.5), pytest.approx(14)),
    ]
    assert timeline.step_s == pytest.approx(16)


def test_the_layer_needed_first_is_updated_first():
    trace = model((1, 1, 1), (1, 1, 10), (1, 1, 1), update_s=3.0)
    timeline = simulate(trace, plan_of(trace, [2, 1, 0]), network())
    assert [span.name for span in timeline.of("update")] == ["l1", "l0", "l2"]


def test_updates_share_the_time_by_size():
    trace = model((1, 1, 1), (3, 1, 1), update_s=4.0)
    durations = {
        span.name: span.end_s - span.start_s
        for span in simulate(trace, plan_of(trace, [1, 0]), network()).of("update")
    }
    assert durations["l1"] / durations["l0"] == pytest.approx(188 / 60)
    assert sum(durations.values()) == pytest.approx(4)


def test_a_layer_with_nothing_to_send_does_not_wait():
    trace = model((0, 5, 1), (2, 1, 1))
    timeline = simulate(trace, plan_of(trace, [0]), network())
    assert on(timeline, "wait", "update")[0][:2] == ("update", "l1")
    assert timeline.step_s == pytest.approx(8)


def test_a_plan_of_nothing_is_computation_alone():
    trace = model((0, 2, 3), (0, 1, 1))
    plan = first_plan(flats_of(trace), network(), ranks=2)
    assert step_time_s(trace, plan, network()) == pytest.approx(7)


def test_spans_are_named_by_the_plan():
    trace = model((1, 1, 1))
    plan = plan_of(trace, [0])
    assert [span.name for span in simulate(trace, plan, network()).of("send")] == [plan.describe(0)]


def test_a_layer_that_the_trace_does_not_have_is_named():
    plan = plan_of(model((1, 1, 1), (1, 1, 1)), [0, 1])
    with pytest.raises(ValueError, match="layer 'l1', but trace 'hand-made' has no such layer"):
        simulate(model((1, 1, 1)), plan, network())


@st.composite
def cases(draw: st.DrawFn) -> tuple[Trace, Plan, Network]:
    trace = draw(strategies.traces())
    flats: tuple[Flat, ...] = draw(strategies.flats(trace))
    network = draw(strategies.networks)
    ranks, window = draw(strategies.ranks), draw(strategies.windows)
    if draw(st.booleans()):
        return trace, make_plan(trace, flats, network, ranks=ranks, window=window), network
    plan = first_plan(flats, network, ranks=ranks, window=window)
    shuffled = tuple(draw(st.permutations(plan.ops)))
    return trace, Plan(ranks, flats, plan.buckets, shuffled, window), network


@given(cases())
def test_data_flows_forward_in_time(case: tuple[Trace, Plan, Network]):
    """Gradient ready, sent, updated, used: none of these before the one in front of it."""
    trace, plan, network = case
    timeline = simulate(trace, plan, network)
    tiny = 1e-12 + 1e-9 * timeline.step_s
    ready = {layer.name: at for layer, at in zip(trace.layers, trace.ready_s(), strict=True)}
    sent = {span.name: span for span in timeline.of("send")}
    updated = {span.name: span for span in timeline.of("update")}
    forward = {span.name: span for span in timeline.of("forward")}
    assert len(sent) == len(plan.buckets)
    for index, bucket in enumerate(plan.buckets):
        span = sent[plan.describe(index)]
        for layer in bucket.layers:
            assert span.start_s >= ready[layer] - tiny
            assert updated[layer].start_s >= span.end_s
            assert updated[layer].start_s >= trace.backward_s - tiny
            assert forward[layer].start_s >= updated[layer].end_s


@given(cases())
def test_ops_end_in_the_order_of_the_plan(case: tuple[Trace, Plan, Network]):
    trace, plan, network = case
    ends = {span.name: span.end_s for span in simulate(trace, plan, network).of("send")}
    in_order = [ends[plan.describe(op.bucket)] for op in plan.ops]
    assert in_order == sorted(in_order)


@given(cases())
def test_every_op_costs_what_the_network_says(case: tuple[Trace, Plan, Network]):
    trace, plan, network = case
    timeline = simulate(trace, plan, network)
    costs = [network.cost_s("allreduce", plan.bucket_bytes(op.bucket)) for op in plan.ops]
    lengths = [span.end_s - span.start_s for span in timeline.of("send")]
    assert sorted(lengths) == pytest.approx(sorted(costs), abs=1e-12 + 1e-9 * timeline.step_s)
    busy = timeline.busy_s("send")
    assert busy <= sum(costs) + 1e-9 * timeline.step_s
    if plan.window == 1 or not network.latency_s:
        assert busy == pytest.approx(sum(costs))


@given(cases())
def test_the_compute_track_is_one_step_without_gaps(case: tuple[Trace, Plan, Network]):
    trace, plan, network = case
    timeline = simulate(trace, plan, network)
    computed = timeline.busy_s("forward", "backward")
    assert computed == pytest.approx(trace.forward_s + trace.backward_s)
    assert computed + timeline.busy_s("wait") == pytest.approx(timeline.step_s)
    assert timeline.step_s == step_time_s(trace, plan, network)


@given(strategies.traces(), st.data())
def test_no_step_beats_the_bound(trace: Trace, data: st.DataObject):
    network, window = data.draw(strategies.networks), data.draw(strategies.windows)
    first = first_plan(flats_of(trace), network, ranks=2)
    shuffled = tuple(data.draw(st.permutations(first.ops)))
    bound = lower_bound_s(trace, network)
    for ops in (shuffled, make_plan(trace, first.flats, network, ranks=2, window=window).ops):
        plan = Plan(2, first.flats, first.buckets, ops, window)
        assert step_time_s(trace, plan, network) >= bound * (1 - 1e-9)
