"""Other ways of training: steps worked out by hand, and what holds for all of them."""

from dataclasses import replace

import pytest
from hypothesis import given

from helpers import strategies
from soonest.core.cost import Cost, Network
from soonest.core.forecast import baselines
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.timeline import Timeline
from soonest.core.trace import Layer, Trace

MB = 1 << 20
SLOT_BYTES = 64
KINDS = ("all_reduce", "ring_reduce_scatter", "all_gather_parameters")


def model(*layers: tuple[int, float, float], update_s: float = 0.0) -> Trace:
    """A trace of layers given as seconds of transfer, forward and backward."""
    return Trace(
        "hand-made",
        tuple(
            Layer(f"l{i}", max(0, size * SLOT_BYTES - 4), fwd * 1e6, bwd * 1e6)
            for i, (size, fwd, bwd) in enumerate(layers)
        ),
        update_us=update_s * 1e6,
    )


def network(latency_s: float = 0.0, rate: float = SLOT_BYTES) -> Network:
    """All-reduces; a reduce-scatter or an all-gather takes half as long."""
    whole, half = Cost.linear(latency_s, rate), Cost.linear(latency_s / 2, 2 * rate)
    return Network(dict(zip(KINDS, (whole, half, half), strict=True)))


def sends(timeline: Timeline) -> list[tuple[float, float]]:
    return [(round(span.start_s, 6), round(span.end_s, 6)) for span in timeline.of("send")]


THREE = model((2, 1, 1), (1, 1, 4), (4, 1, 2), update_s=3.0)


def test_sequential_sends_layer_by_layer_once_all_gradients_are_there():
    step = baselines.sequential(THREE, network(), ranks=2)
    assert sends(step) == [(7, 11), (11, 12), (12, 14)]
    assert [(s.start_s, s.end_s) for s in step.of("update")] == [pytest.approx((14, 17))]
    assert step.step_s == pytest.approx(20)


def test_sequential_hides_no_latency():
    assert baselines.sequential(THREE, network(0.5), ranks=2).step_s == pytest.approx(20 + 3 * 0.5)


def test_ddp_overlaps_the_backward_pass_and_nothing_else():
    each = [SLOT_BYTES / MB / 2]  # every layer fills a bucket
    step = baselines.ddp(THREE, network(), ranks=2, caps_mb=each)
    assert sends(step) == [(2, 6), (6, 7), (7, 9)]
    assert step.step_s == pytest.approx(9 + 3 + 3)
    one = baselines.ddp(THREE, network(), ranks=2)  # all in the first bucket
    assert sends(one) == [(7, 14)]
    tuned = replace(THREE, layers=tuple(replace(y, bytes=y.bytes * 10**4) for y in THREE.layers))
    fast = network(rate=SLOT_BYTES * 10**4)
    times = [
        baselines.ddp(tuned, fast, ranks=2, caps_mb=caps).step_s
        for caps in baselines.SWEEP_MB.values()
    ]
    best = baselines.ddp_tuned(tuned, fast, ranks=2)
    assert best.step_s == min(times) < max(times)
    assert best.title == "ddp-tuned"


@pytest.mark.parametrize(("in_flight", "end_s"), [(1, 14), (2, 8)])
def test_latencies_overlap_if_several_buckets_may_be_on_their_way(in_flight: int, end_s: float):
    trace = model((1, 0, 0), (3, 0, 0), (1, 0, 0))
    each = [SLOT_BYTES / MB / 2]
    step = baselines.ddp(trace, network(3.0), ranks=2, caps_mb=each, in_flight=in_flight)
    assert step.step_s == pytest.approx(end_s)


def test_ddp_fills_buckets_from_the_last_layer_on():
    sizes = (3, 0, 20, 2, 30, 0.5, 0.6)
    trace = Trace("t", tuple(Layer(str(i), int(s * MB), 1, 1) for i, s in enumerate(sizes)))
    assert baselines.ddp_buckets(trace, (1, 25)) == [[6, 5], [4], [3, 2, 0]]
    assert baselines.ddp_buckets(trace, (1,)) == [[6, 5], [4], [3], [2], [0]]
    assert baselines.ddp_buckets(trace, (400,)) == [[6, 5, 4, 3, 2, 0]]


def test_fsdp2_gathers_the_next_layer_while_one_computes():
    trace = model((2, 3, 1), (4, 1, 1), (2, 1, 2), update_s=4.0)
    step = baselines.fsdp2(trace, network(), ranks=4)
    # From 2 s on, gradients are scattered for 1, 2 and 1 s; each of 4 ranks updates for 1 s.
    ends = [end for _, end in sends(step)[:3]]
    assert ends == pytest.approx([3, 5, 6], abs=0.2)
    (update,) = step.of("update")
    assert update.end_s - update.start_s == pytest.approx(1.0)
    starts = [span.start_s for span in step.of("forward")]
    # 7: gathering the first; 8: it computes, and the second is gathered until 10.
    assert starts == pytest.approx([8, 11, 12], abs=0.2)
    assert step.step_s == pytest.approx(13, abs=0.2)


def test_fsdp2_that_reshards_gathers_twice():
    trace = model((2, 3, 1), (4, 1, 1), (2, 1, 2))
    kept = baselines.fsdp2(trace, network(), ranks=4)
    again = baselines.fsdp2(trace, network(), ranks=4, reshard=True)
    assert len(again.of("send")) == len(kept.of("send")) + 3
    assert again.of("backward")[0].start_s == pytest.approx(1, abs=0.1), "nothing to hide behind"
    assert again.step_s > kept.step_s


def test_fsdp2_groups_neighbours():
    trace = Trace("t", tuple(Layer(str(i), 3 * MB, 1, 1) for i in range(5)))
    names = [s.name for s in baselines.fsdp2(trace, network(), ranks=2, group_mb=5).of("send")]
    assert sorted(set(names)) == ["0, 1", "2, 3", "4"]


def test_on_cpus_fsdp2_overlaps_nothing():
    step = baselines.fsdp2_on_gloo(THREE, network(), ranks=3)
    shared = sum(layer.bytes for layer in THREE.layers) / SLOT_BYTES
    assert step.step_s == pytest.approx(10 + 1.5 * shared + 1)


def test_nothing_to_send():
    trace = model((0, 2, 3), (0, 1, 1))
    for arm in (
        baselines.sequential,
        baselines.ddp,
        baselines.ddp_tuned,
        baselines.fsdp2,
        baselines.fsdp2_on_gloo,
    ):
        assert arm(trace, network(1.0), ranks=4).step_s == pytest.approx(7)


@given(strategies.traces(), strategies.networks)
def test_no_peer_beats_the_bound_and_none_is_behind_sequential(trace: Trace, net: Network):
    bound_s = lower_bound_s(trace, net)
    slowest_s = baselines.sequential(trace, net, ranks=2).step_s * (1 + 1e-9)
    for arm in (baselines.ddp, baselines.ddp_tuned):
        step = arm(trace, net, ranks=2)
        assert bound_s * (1 - 1e-9) <= step.step_s <= slowest_s
        busy_s = step.busy_s("forward", "backward", "wait")
        assert busy_s == pytest.approx(step.step_s), "computing or waiting, without gaps"
