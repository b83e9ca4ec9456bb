"""The search for the best plan: its clock, what it finds in every regime, and what that costs."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import strategies
from soonest.core.cost import Cost, Network
from soonest.core.plan import METHODS, Bucket, Flat, Op, Plan, shards
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.planner.initial_orders import dispatched, simple_orders
from soonest.core.planner.local_search import search
from soonest.core.planner.pieces import Send
from soonest.core.planner.planner import MAX_WORK, best_plan, flats_of, make_plan
from soonest.core.planner.search_space import Space
from soonest.core.simulator.simulate import step_time_s
from soonest.core.trace import Layer, Trace

MB = 1_000_000
SHIPPED = ["alexnet", "googlenet", "resnet50", "vgg16"]
TINY = 1e-9


def network_for(trace: Trace, ratio: float, latency_share: float = 1e-3) -> Network:
    """A network that takes ``ratio`` times the computation, with latency as a share of it."""
    compute_s = trace.forward_s + trace.backward_s
    return Network.linear(
        latency_s=latency_share * compute_s, bytes_per_s=trace.total_bytes / (ratio * compute_s)
    )


# Its clock.


@st.composite
def orders(draw: st.DrawFn) -> tuple[Space, list[Send], int]:
    """Any valid order of the ops of any pieces, whatever their methods."""
    trace = draw(strategies.traces())
    costs = {
        kind: Cost.linear(draw(st.sampled_from([0.0, 1e-5, 1e-3])), draw(st.floats(1e6, 1e10)))
        for kinds in METHODS.values()
        for kind in kinds
    }
    sharded = draw(st.booleans())
    space = Space(
        trace,
        draw(strategies.flats(trace)),
        Network(costs),
        ranks=draw(strategies.ranks),
        methods=[method for method in METHODS if shards(method) == sharded],
        slice_bytes=draw(st.sampled_from([64.0, 1e5, 1e12])),
    )
    pieces = []
    for flat, points in enumerate(space.points):
        inner = draw(st.sets(st.sampled_from(points[1:-1]), max_size=6)) if points[2:] else set()
        at = sorted({0, len(points) - 1} | {points.index(point) for point in inner})
        pieces += [draw(st.sampled_from(space.every(flat, a, b))) for a, b in pairwise(at)]
    order: list[Send] = []
    left = [list(piece.sends) for piece in pieces]
    while any(left):
        may = [ops for ops in left if ops and not ops[0].gathers] or [ops for ops in left if ops]
        order.append(draw(st.sampled_from(may)).pop(0))
    return space, order, draw(strategies.windows)


@given(orders())
def test_an_order_takes_as_long_as_the_simulator_says(case: tuple[Space, list[Send], int]):
    space, order, window = case
    plan = space.plan(order, window)
    assert [(op.bucket, op.kind) for op in plan.ops] == [
        (space.pieces_of(order).index(send.piece), METHODS[send.piece.method][send.stage])
        for send in order
    ]
    step_s = step_time_s(space.trace, plan, space.network)
    assert space.timer.step_s(order, window) == pytest.approx(step_s, rel=TINY)


@given(orders(), st.floats(0.5, 1.5))
def test_a_limit_changes_nothing_below_it(case: tuple[Space, list[Send], int], share: float):
    space, order, window = case
    step_s = space.timer.step_s(order, window)
    limited_s = space.timer.step_s(order, window, share * step_s)
    assert limited_s == step_s if share > 1 else limited_s >= share * step_s * (1 - TINY)


@given(orders())
def test_dispatched_orders_are_valid(case: tuple[Space, list[Send], int]):
    space, order, window = case
    again = dispatched(space, space.pieces_of(order))
    assert len(again) == len(order)
    space.plan(again, window)  # It refuses an order that is not.


# What it finds.


def layer_bucket(flat: Flat, start: int, stop: int) -> Bucket:
    layers = dict.fromkeys(s.layer for s in flat.slots if start <= s.start < stop)
    return Bucket(0, start, stop, "allreduce", tuple(layers))


def simple_plans(trace: Trace, flat: Flat) -> list[Plan]:
    """One bucket; one per layer; as many layers as fill 25 MB: all in the order they are ready."""
    ready = dict(zip((layer.name for layer in trace.layers), trace.ready_s(), strict=True))
    per_layer = [slot.start for slot in flat.slots] + [flat.numel]
    filled = [flat.numel]
    for start in per_layer[-2::-1]:
        if start == 0 or (filled[-1] - start) * flat.itemsize >= 25 * MB:
            filled.append(start)
    plans: list[Plan] = []
    for borders in ([0, flat.numel], per_layer, filled[::-1]):
        buckets = tuple(layer_bucket(flat, a, b) for a, b in pairwise(borders))
        at = [max(ready[layer] for layer in bucket.layers) for bucket in buckets]
        order = sorted(range(len(buckets)), key=lambda i: (at[i], -i))
        plans.append(Plan(4, (flat,), buckets, tuple(Op(i, "all_reduce") for i in order), 4))
    return plans


def even(count: int, size: int) -> tuple[Layer, ...]:
    return tuple(Layer(f"l{i}", size, 1000.0, 2000.0) for i in range(count))


def giant_first() -> Trace:
    """An embedding ten times as large as all the rest, and no work to speak of."""
    return Trace("giant", (Layer("embedding", 1000 * MB, 10, 20), *even(24, 4 * MB)))


def tied() -> Trace:
    """The last layer computes with the weights of the first one: ready last, needed first."""
    return Trace(
        "tied", (Layer("both", 100 * MB, 10, 20), *even(24, 12 * MB), Layer("head", 0, 5000, 9000))
    )


def tiny() -> Trace:
    return Trace("tiny", even(600, 4000))


def uneven(seed: int, count: int = 60) -> Trace:
    draw = random.Random(seed)
    layers = (
        Layer(str(i), int(10 ** draw.uniform(3, 7)), draw.uniform(0, 900), draw.uniform(0, 1800))
        for i in range(count)
    )
    return Trace("uneven", tuple(layers), 500.0)


def shuffled(flat: Flat) -> Flat:
    """The same parameters in another order: what is side by side is not ready side by side."""
    slots = list(flat.slots)
    random.Random(3).shuffle(slots)
    return Flat.lay_out(flat.dtype, flat.itemsize, [(s.name, s.layer, s.numel) for s in slots])


CASES = {
    **{f"{name}, {ratio}": (Trace.load(name), ratio) for name in SHIPPED for ratio in (0.1, 1, 10)},
    "giant first, 0.3": (giant_first(), 0.3),
    "giant first, 1": (giant_first(), 1),
    "tied, 0.3": (tied(), 0.3),
    "tied, 1": (tied(), 1),
    "tiny, 1": (tiny(), 1),
    "tiny, 10": (tiny(), 10),
    "uneven, 1": (uneven(1), 1),
    "uneven, 3": (uneven(2), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_every_regime_comes_near_to_the_bound_and_beats_simple_plans(case: str):
    trace, ratio = CASES[case]
    flats, network = flats_of(trace), network_for(trace, ratio)
    plan = best_plan(trace, flats, network, ranks=4)
    step_s = step_time_s(trace, plan, network)
    # What alignment adds to parameters is no fault of a plan.
    padding = flats[0].numel * flats[0].itemsize / trace.total_bytes
    assert step_s <= 1.02 * padding * lower_bound_s(trace, network)
    simple = [step_time_s(trace, other, network) for other in simple_plans(trace, flats[0])]
    usual = step_time_s(trace, make_plan(trace, flats, network, ranks=4), network)
    assert step_s <= min(*simple, usual) * (1 + 1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_ready_out_of_order_cost_little(seed: int):
    trace = uneven(seed, 40)
    flat, network = shuffled(flats_of(trace)[0]), network_for(trace, 1.0)
    plan = best_plan(trace, (flat,), network, ranks=4)
    step_s = step_time_s(trace, plan, network)
    assert step_s <= 1.06 * lower_bound_s(trace, network)
    assert step_s <= min(step_time_s(trace, p, network) for p in simple_plans(trace, flat))


def test_where_the_network_is_fast_there_are_few_ops():
    trace = replace(Trace.load("resnet50"), update_us=0.0)
    network = network_for(trace, 0.1, 1e-4)
    plan = best_plan(trace, flats_of(trace), network, ranks=4)
    assert len(plan.ops) <= 24
    assert plan.window == 1


def test_methods_change_where_windows_hide_latency():
    """Nothing hides the latency of what is ready last; elsewhere only the rate counts.

    On networks a little slower, where that gains less, the search needs more than its usual work to
    find out; see ``best_plan``.
    """
    trace = Trace("t", (Layer("first", MB // 10, 1000, 2000), *even(16, MB)))
    bytes_per_s = 1.5 * trace.total_bytes / (trace.forward_s + trace.backward_s)
    late = 2e-3
    network = Network(
        {
            "all_reduce": Cost.linear(late, 1.0 * bytes_per_s),
            "exchange": Cost.linear(late / 10, 0.6 * bytes_per_s),
        }
    )
    plan = best_plan(trace, flats_of(trace), network, ranks=4)
    assert {bucket.method for bucket in plan.buckets} == {"allreduce", "exchange"}
    for method in ("allreduce", "exchange"):
        held = best_plan(trace, flats_of(trace), network, ranks=4, methods=(method,))
        assert {bucket.method for bucket in held.buckets} == {method}
        assert step_time_s(trace, plan, network) < step_time_s(trace, held, network)


def test_a_plan_shards_all_or_nothing_whichever_is_faster():
    trace, network = Trace.load("alexnet"), Network.ideal(4, 100e9, 1e-5)
    both = ("allreduce", "shard_direct")
    plans = [
        best_plan(trace, flats_of(trace), network, ranks=4, methods=methods)
        for methods in (both, both[:1], both[1:])
    ]
    mixed, whole, parts = (step_time_s(trace, plan, network) for plan in plans)
    assert mixed <= min(whole, parts) * (1 + 1e-3)
    assert not plans[1].sharded
    assert plans[2].sharded


@given(st.data())
def test_best_plans_are_deterministic_and_no_shorter_than_the_bound(data: st.DataObject):
    trace = data.draw(strategies.traces(max_layers=5))
    flats, network = flats_of(trace), data.draw(strategies.networks)
    a, b = (best_plan(trace, flats, network, ranks=2, max_work=5000) for _ in range(2))
    assert a.difference(b) is None
    assert step_time_s(trace, a, network) >= lower_bound_s(trace, network) * (1 - TINY)


def test_a_model_of_nothing_needs_no_op():
    trace = Trace("t", (Layer("a", 0, 1, 1),))
    assert best_plan(trace, flats_of(trace), network_for(uneven(1), 1), ranks=2).ops == ()


def test_windows_must_let_something_fly():
    trace = uneven(1, 3)
    for windows in ((), (0, 2)):
        with pytest.raises(ValueError, match="windows"):
            best_plan(trace, flats_of(trace), network_for(trace, 1), ranks=2, windows=windows)


# What that costs.


@pytest.mark.parametrize("methods", [("allreduce",), ("allreduce", "exchange", "split")])
def test_a_thousand_tensors_take_bounded_work(methods: tuple[str, ...]):
    trace = uneven(1, 1000)
    flats, network = flats_of(trace), Network.ideal(16, 20e9, 2e-5)
    space = Space(trace, flats, network, ranks=16, methods=methods, slice_bytes=1e6)
    starts = simple_orders(space)
    longest = max(map(len, starts))
    timed = len(starts) * (longest + 2 * len(trace.layers) + 10)
    assert longest <= 200
    assert timed <= MAX_WORK / 8
    search(space, starts, 4, bound_s=0.0, max_work=MAX_WORK)
    assert space.timer.work <= MAX_WORK + timed


def test_more_work_finds_no_worse_plan():
    trace = uneven(5)
    flats, network = flats_of(trace), network_for(trace, 1.0)
    steps = [
        step_time_s(trace, best_plan(trace, flats, network, ranks=4, max_work=work), network)
        for work in (0, 20_000, MAX_WORK)
    ]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[-1]
