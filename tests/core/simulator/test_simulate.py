"""The simulated step: cases worked out by hand, and what holds for every plan."""

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from soonest.core.cost import Cost, Network
from soonest.core.plan import METHODS, Bucket, Op, Plan
from soonest.core.planner.planner import first_plan, flats_of
from soonest.core.simulator.simulate import simulate, step_time_s
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
    # l1 is ready at 5, issued then and reduced at 5 + 0.5 + 2. l0 is ready at 6, and so is issued
    # within the window; it transfers for 1 s behind l1, until 8.5. Meanwhile l1 is being updated.
    first, second = 7.5 + parts[1], 7.5 + parts[1] + parts[0]
    assert on(timeline, "update") == [
        ("update", plan.describe(1), pytest.approx(7.5), pytest.approx(first)),
        ("update", plan.describe(0), pytest.approx(first), pytest.approx(second)),
    ]
    # l0 is gathered first, as planned: 0.5 s of latency, 1 s of transfer; l1 has 2 s behind it. The
    # backward pass ended at 6, and each layer's forward takes 1 s.
    gathered = [second + 1.5, second + 3.5]
    assert [end for _, end in sends(timeline)] == pytest.approx([7.5, 8.5, *gathered])
    assert on(timeline, "wait") == [
        ("wait", "l0", pytest.approx(6), pytest.approx(gathered[0])),
        ("wait", "l1", pytest.approx(gathered[0] + 1), pytest.approx(gathered[1])),
    ]
    assert timeline.step_s == pytest.approx(gathered[1] + 1)


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


def test_only_the_ops_said_to_fly_alone_do():
    """Of the two ops of a bucket it may be one: the second op of l1 here, and not the first."""
    trace = model((1, 1, 0.5), (1, 1, 1))
    plan = several_ops("shard", trace, [(1, 0), (0, 0), (1, 1), (0, 1)])
    *first, gathered, last = plan.ops
    plan = replace(plan, ops=(*first, replace(gathered, alone=True), last))
    # Each has 0.5 s of latency and 0.5 s of transfer, and parts take no time. l1 is ready at 1, l0
    # at 1.5, while l1 is in flight. l1 is reduced at 2, and gathered from then to 3. l0 is reduced
    # at 2.5, but has to wait for that.
    assert sends(simulate(trace, plan, slow_ops())) == [(1, 2), (1.5, 2.5), (2, 3), (3, 4)]


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


def test_an_update_that_has_begun_runs_to_its_end():
    trace = model((1, 10, 1), (1, 10, 1), update_s=10.0)
    # l1 is sent from 1 to 2 and l0 from 2 to 3. l1 is reduced as the backward pass ends, and so
    # updated from 2 to 7, and l0, though needed first, from 7 to 12: 12 + 10 + 10.
    assert step_time_s(trace, plan_of(trace, [1, 0]), network()) == pytest.approx(32)
    # If l0 is sent first, from 2 to 3, it is updated from 3 to 8. l1 is sent from 3 to 4 and
    # updated from 8 to 13, while l0 computes until 18: 18 + 10.
    assert step_time_s(trace, plan_of(trace, [0, 1]), network()) == pytest.approx(28)


def test_a_faster_network_may_bring_the_wrong_update_forward():
    """All layers but l2 (8 units) are of 1 unit; 3 s of latency, all three ops in flight."""
    trace = model((1, 10, 8), (1, 0, 0), (8, 0, 1), update_s=3.4 * 628 / 60)
    plan = plan_of(trace, [2, 1, 0], window=3)
    # At a unit a second l2 is sent by 1 + 3 + 8 = 12 and updated at once, until past 14. Meanwhile
    # l1 is sent by 13 and l0, ready at 9, its latency hidden, by 14. So l0 is next: 60 of 628 bytes
    # are 3.4 s. Then its forward takes 10 s, longer than the update of l1.
    usual_s = 12 + 3.4 * (508 + 60) / 60 + 10
    assert step_time_s(trace, plan, network(3.0)) == pytest.approx(usual_s)
    # At twice the rate l2 and l1 are sent by 8.5, before the backward pass ends at 9. So l1 is
    # updated first, then l2, as l0 comes at 9 + 3 + 0.5, just after that has begun.
    faster_s = 9 + 3.4 * (60 + 508 + 60) / 60 + 10
    assert step_time_s(trace, plan, network(3.0).slowed(0.5)) == pytest.approx(faster_s)
    assert faster_s > usual_s


def test_clipped_gradients_are_all_reduced_before_any_is_used():
    trace = model((1, 1, 1), (2, 1, 10), (3, 1, 1), update_s=3 * 376 / 124)
    timeline = simulate(trace, plan_of(trace, [2, 1, 0]), network(), clip=True)
    # l2 is sent from 1 to 4, l1 from 11 to 13, l0 from 13 to 14. Then all are updated, the layer
    # needed first in front, though l2 was reduced long before: 60, 124 and 188 bytes of 372.
    ends = [14 + 3 * 376 / 124 * size / 372 for size in (60, 60 + 124, 372)]
    assert sends(timeline) == [(1, 4), (11, 13), (13, 14)]
    assert on(timeline, "update") == [
        ("update", "l0", pytest.approx(14), pytest.approx(ends[0])),
        ("update", "l1", pytest.approx(ends[0]), pytest.approx(ends[1])),
        ("update", "l2", pytest.approx(ends[1]), pytest.approx(ends[2])),
    ]
    # Forward passes take 1 s each, less than the update of l1 and of l2.
    assert timeline.step_s == pytest.approx(ends[2] + 1)


def test_clipping_parts_takes_an_op_of_its_own():
    trace = model((1, 1, 1), (1, 1, 1), update_s=120 / 64 * 2)
    plan = several_ops("shard", trace, [(1, 0), (0, 0), (0, 1), (1, 1)])
    cheaper = Network({**slow_ops().costs, "exchange": Cost.linear(0.25, UNIT_BYTES)})
    timeline = simulate(trace, plan, cheaper, clip=True)
    # Reduced at 2 and 3. A number takes 0.25 s by the cheapest method that reduces, not 0.5 s.
    # Each part is 32 of 120 bytes of 3.75 s: 1 s. So l0 is updated from 3.25 to 4.25, l1 until
    # 5.25; l0 is gathered from 4.25 to 5.25 and computes until 6.25, as l1 is from 5.25 on.
    assert sends(timeline) == [(1, 2), (2, 3), (3, 3.25), (4.25, 5.25), (5.25, 6.25)]
    assert [span.name for span in timeline.of("send")][2] == "norm of all gradients"
    assert [(s.start_s, s.end_s) for s in timeline.of("update")] == [
        (pytest.approx(3.25), pytest.approx(4.25)),
        (pytest.approx(4.25), pytest.approx(5.25)),
    ]
    assert timeline.step_s == step_time_s(trace, plan, cheaper, clip=True) == pytest.approx(7.25)


def test_clipping_nothing_takes_no_time():
    trace = model((0, 2, 3))
    plan = first_plan(flats_of(trace), network(), ranks=2)
    assert step_time_s(trace, plan, network(), clip=True) == pytest.approx(5)


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


def test_a_plan_that_blocks_updates_when_all_is_there_and_computes_behind_that():
    """The last layer's gradients are ready at 1 and the first's at 3, a step waits for both."""
    trace = model((1, 2, 2), (2, 1, 1), update_s=3)
    overlapped = plan_of(trace, [1, 0])
    timeline = simulate(trace, replace(overlapped, blocking=True), network())
    assert sends(timeline) == [(1, 3), (3, 4)]
    spans = {name: (start, end) for _, name, start, end in on(timeline, "forward")}
    (_, _, _, updated) = on(timeline, "update")[-1]
    assert min(start for _, _, start, _ in on(timeline, "update")) == 4
    assert spans["l0"][0] == pytest.approx(updated)
    assert timeline.step_s == pytest.approx(4 + 3 + 3)
    assert step_time_s(trace, overlapped, network()) < timeline.step_s


def taken_s(buckets: int, method: str) -> float:
    """Processor time of one simulated step with so many buckets, the least of several."""
    layers = tuple(Layer(f"l{i}", 6396, 10.0 + i % 7, 20.0 + i % 5) for i in range(buckets))
    trace = Trace("t", layers, 5000.0)
    network = Network.ideal(4, 1e10, 1e-5)
    plan = first_plan(flats_of(trace), network, ranks=4, methods=[method])
    pieces = tuple(
        Bucket(0, slot.start, slot.start + 1600, method, (slot.layer,))
        for slot in plan.flats[0].slots
    )
    ops = [Op(i, kind) for kind in METHODS[method] for i in range(buckets)]
    plan = Plan(4, plan.flats, pieces, tuple(ops))
    taken: list[float] = []
    for _ in range(10):
        began = time.process_time()
        step_time_s(trace, plan, network)
        taken.append(time.process_time() - began)
    return min(taken)


@pytest.mark.parametrize("method", ["allreduce", "shard"])
def test_ten_times_as_many_buckets_take_about_ten_times_as_long(method: str):
    assert taken_s(2000, method) < 30 * taken_s(200, method)
