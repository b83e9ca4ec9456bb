"""The simulated step under any plan: beside discrete events, and what always holds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import strategies
from helpers.oracle import World, flat, spans
from soonest.core.cost import Network
from soonest.core.plan import GATHER_PARAMETERS, Plan
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.planner.planner import flats_of, make_plan
from soonest.core.simulator.simulate import Run, run, simulate, step_time_s
from soonest.core.simulator.workload import Workload
from soonest.core.trace import Trace

seeds = st.integers(0, 2**32)
both = pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])


def run_of(trace: Trace, plan: Plan, network: Network, *, clip: bool) -> Run:
    work = Workload.of(trace, plan.flats, plan.buckets, network, ranks=plan.ranks, clip=clip)
    alone = [op.alone for op in plan.ops]
    return run(work, work.sequence(plan.ops), plan.window, alone=alone)


@both
@given(seeds, st.booleans())
def test_discrete_events_show_the_same_step(sharded: bool, seed: int, clip: bool):
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    world = World(trace, plan, network, factors=[1.0] * plan.ranks, clip=clip)
    timeline = simulate(trace, plan, network, clip=clip)
    simulated, seen = spans(timeline), world.seen_by(0, 0)
    assert [span[:2] for span in simulated] == [span[:2] for span in seen]
    assert flat(simulated) == pytest.approx(flat(seen), rel=1e-9, abs=1e-12)
    assert timeline.step_s == pytest.approx(world.ranks[0].began[1], rel=1e-9)


@both
@given(seeds, st.booleans())
def test_no_bucket_is_sent_before_it_is_ready(sharded: bool, seed: int, clip: bool):
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    ready = {layer.name: at for layer, at in zip(trace.layers, trace.ready_s(), strict=True)}
    seen = run_of(trace, plan, network, clip=clip)
    for op, issued, before in zip(plan.ops, seen.issued, plan.before, strict=True):
        assert issued >= max(ready[layer] for layer in plan.buckets[op.bucket].layers)
        if before >= 0:
            assert issued >= seen.transfers[before][1]
        if op.kind == GATHER_PARAMETERS:
            part = seen.parts[op.bucket]
            assert part
            assert issued >= part[1]
            assert part[0] >= max(seen.transfers[before][1], *ready.values())


@both
@given(seeds, st.booleans())
def test_the_lane_keeps_its_order_and_its_window(sharded: bool, seed: int, clip: bool):
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    seen = run_of(trace, plan, network, clip=clip)
    assert list(seen.issued) == sorted(seen.issued)
    assert seen.transfers == sorted(seen.transfers)
    ends = [end for _, end in seen.transfers]
    for index, issued in enumerate(seen.issued):
        assert sum(end > issued for end in ends[:index]) < plan.window
        if index and plan.ops[index - 1].alone:
            assert issued >= ends[index - 1]
        assert seen.transfers[index][0] >= issued + network.op(plan.ops[index].kind).latency_s


@both
@given(seeds, st.booleans())
def test_no_layer_runs_before_its_data_is_there(sharded: bool, seed: int, clip: bool):
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    seen = run_of(trace, plan, network, clip=clip)
    for index, (layer, (start, _)) in enumerate(zip(trace.layers, seen.forwards, strict=True)):
        of_it = [i for i, bucket in enumerate(plan.buckets) if layer.name in bucket.layers]
        last = max(
            (seen.transfers[i][1] for i, op in enumerate(plan.ops) if op.bucket in of_it),
            default=0.0,
        )
        update = seen.updates[index]
        assert start >= last
        assert (update is not None) == bool(of_it and not sharded)
        if update:
            assert last <= update[0] <= update[1] <= start
            assert update[0] >= max(trace.ready_s())


@both
@given(seeds)
def test_clipping_holds_every_update_back_until_all_is_reduced(sharded: bool, seed: int):
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    seen = run_of(trace, plan, network, clip=True)
    reducing = [seen.transfers[i][1] for i in plan.reduces]
    updates = [update for update in (*seen.updates, *seen.parts) if update]
    assert all(update[0] >= max(reducing) for update in updates)
    if sharded and updates:
        assert seen.norm
        assert seen.norm[0] >= max(reducing)
        assert all(update[0] >= seen.norm[1] for update in updates)
    # With updates that could be the other way round: they would begin in another order.
    idle = replace(trace, update_us=0.0)
    clipped_s = step_time_s(idle, plan, network, clip=True)
    assert clipped_s >= step_time_s(idle, plan, network) * (1 - 1e-12)


@both
@given(seeds, st.booleans())
def test_work_is_conserved(sharded: bool, seed: int, clip: bool):
    """Everything is computed, sent and updated once, for as long as it takes, and in turn."""
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    timeline = simulate(trace, plan, network, clip=clip)
    tiny = 1e-12 + 1e-9 * timeline.step_s

    def lengths(*kinds) -> list[float]:
        return sorted(span.end_s - span.start_s for span in timeline.of(*kinds))

    computed = [us * 1e-6 for layer in trace.layers for us in (layer.fwd_us, layer.bwd_us)]
    assert lengths("forward", "backward") == pytest.approx(sorted(computed), abs=tiny)
    assert timeline.busy_s("forward", "backward", "wait") == pytest.approx(timeline.step_s)
    sizes = [plan.bucket_bytes(op.bucket) for op in plan.ops]
    sent = [network.op(op.kind).alone_s(size) for op, size in zip(plan.ops, sizes, strict=True)]
    if clip and plan.sharded:
        sent.append(min(network.cost_s(m, 0) for m in network.methods if "shard" not in m))
    assert lengths("send") == pytest.approx(sorted(sent), abs=tiny)
    if plan.sharded:
        of_all = [plan.bucket_bytes(i) / plan.ranks for i in range(len(plan.buckets))]
    else:
        carried = {layer for bucket in plan.buckets for layer in bucket.layers}
        of_all = [layer.bytes for layer in trace.layers if layer.name in carried]
    updated = [part / max(1, trace.total_bytes) * trace.update_us * 1e-6 for part in of_all]
    assert lengths("update") == pytest.approx(sorted(updated), abs=tiny)
    assert timeline.busy_s("update") == pytest.approx(sum(updated), abs=tiny)


@both
@given(seeds, st.booleans())
def test_no_step_beats_the_bound(sharded: bool, seed: int, clip: bool):
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    mine = replace(trace, update_us=trace.update_us / (plan.ranks if sharded else 1))
    step_s = step_time_s(trace, plan, network, clip=clip)
    assert step_s >= lower_bound_s(mine, network) * (1 - 1e-9)


@given(strategies.traces(), strategies.networks, strategies.windows)
def test_no_good_plan_beats_the_bound_either(trace: Trace, network: Network, window: int):
    plan = make_plan(trace, flats_of(trace), network, ranks=2, window=window)
    bound_s = lower_bound_s(trace, network)
    assert step_time_s(trace, plan, network) >= bound_s * (1 - 1e-9)


@both
@given(seeds, st.booleans(), st.floats(1.0, 100.0))
def test_more_bandwidth_is_never_slower(sharded: bool, seed: int, clip: bool, factor: float):
    """But for an update that has begun before the one needed first could: it runs to its end."""
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    faster, usual = (
        run_of(trace, plan, each, clip=clip) for each in (network.slowed(1 / factor), network)
    )
    updates = [end - start for start, end in filter(None, (*usual.updates, *usual.parts))]
    begun_s = sum(updates) if sharded else max(updates, default=0.0)
    allowed = 0.0 if clip else begun_s
    assert faster.step_s <= usual.step_s * (1 + 1e-9) + allowed


@both
@given(seeds)
def test_blocking_is_never_faster(sharded: bool, seed: int):
    """But for an update that has begun before the one needed first could: it runs to its end."""
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    usual = run_of(trace, plan, network, clip=False)
    updates = [end - start for start, end in filter(None, (*usual.updates, *usual.parts))]
    begun_s = sum(updates) if sharded else max(updates, default=0.0)
    blocking_s = step_time_s(trace, replace(plan, blocking=True), network)
    assert blocking_s >= usual.step_s * (1 - 1e-9) - begun_s
