"""Ranks that are not alike: cases worked out by hand, discrete events, and what always holds."""

import statistics
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import strategies
from helpers.oracle import World, flat, spans
from soonest.core.cost import Cost, Network
from soonest.core.plan import Bucket, Op, Plan
from soonest.core.planner.planner import flats_of, make_plan
from soonest.core.simulator.cluster import Steps, simulate_ranks
from soonest.core.simulator.simulate import simulate, step_time_s
from soonest.core.trace import Layer, Trace

seeds = st.integers(0, 2**32)
both = pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])


def one_layer(update_s: float = 0.0, method: str = "allreduce") -> tuple[Trace, Plan, Network]:
    """One layer on two ranks: 3 s forward, 2 s backward, 1 s of latency, 4 s of transfer."""
    trace = Trace("one", (Layer("l0", 60, 3e6, 2e6),), update_s * 1e6)
    kinds = {
        "all_reduce": Cost.linear(1.0, 16.0),
        "reduce_scatter": Cost.linear(1.0, 16.0),
        "all_gather_parameters": Cost.linear(1.0, 16.0),
    }
    ops = {
        "allreduce": (Op(0, "all_reduce"),),
        "shard_direct": (Op(0, "reduce_scatter"), Op(0, "all_gather_parameters")),
    }
    plan = Plan(2, flats_of(trace), (Bucket(0, 0, 16, method, ("l0",)),), ops[method])
    return trace, plan, Network(kinds)


def lanes(steps: Steps) -> dict[str, list[tuple[float, float]]]:
    """When everything happened in the last step, by kind."""
    found: dict[str, list[tuple[float, float]]] = {}
    for span in steps.timeline.spans:
        if span.end_s == span.start_s:
            continue
        found.setdefault(span.kind, []).append((round(span.start_s, 9), round(span.end_s, 9)))
    return found


def test_all_wait_for_the_straggler():
    trace, plan, network = one_layer()
    # Rank 1 computes twice as long: backward 4 s, then 1 + 4 s of sending, then forward 6 s: 15 s.
    steps = {r: simulate_ranks(trace, plan, network, stragglers={1: 2.0}, rank=r) for r in (0, 1)}
    assert steps[0].step_s == pytest.approx([15.0] * 10)
    assert steps[0].median_s == pytest.approx(15.0)
    assert lanes(steps[1]) == {
        "backward": [(0, 4)], "send": [(4, 9)], "wait": [(4, 9)], "forward": [(9, 15)]
    }  # fmt: skip
    # Rank 0 ended its forward pass 3 s earlier, so it has begun 3 s earlier, and is ready at 2. The
    # straggler's gradients come at 3 + 4. After 1 + 4 s of sending it needs 3 s: also 15 s.
    assert lanes(steps[0]) == {
        "backward": [(0, 2)], "send": [(7, 12)], "wait": [(2, 12)], "forward": [(12, 15)]
    }  # fmt: skip


def test_updates_of_a_straggler_take_longer_too():
    trace, plan, network = one_layer(update_s=1.0)
    steps = simulate_ranks(trace, plan, network, stragglers={1: 2.0}, rank=1)
    # Backward until 4, sending until 9, an update of 2 s, then 6 s of forward.
    assert lanes(steps)["update"] == [(9, 11)]
    assert steps.step_s == pytest.approx([17.0] * 10)


def test_nobody_shares_parameters_before_the_last_rank_has_updated_its_part():
    trace, plan, network = one_layer(update_s=60 / 64 * 4, method="shard_direct")
    steps = simulate_ranks(trace, plan, network, stragglers={1: 2.0}, rank=1)
    # A part is 32 of 60 bytes, so it takes 2 s, and the straggler 4. Backward until 4, sending
    # until 9, update until 13, gathering until 18, forward until 24.
    assert lanes(steps) == {
        "backward": [(0, 4)],
        "send": [(4, 9), (13, 18)],
        "update": [(9, 13)],
        "wait": [(4, 18)],
        "forward": [(18, 24)],
    }
    # The other one begins 3 s earlier, gets the gradients at 12 and needs 2 s for the update.
    other = lanes(simulate_ranks(trace, plan, network, stragglers={1: 2.0}, rank=0))
    assert (other["update"], other["send"]) == ([(12, 14)], [(7, 12), (16, 21)])


def test_norms_of_parts_are_summed_when_the_last_rank_can():
    """A layer of 100 s of backward that is not sent: the straggler ends it long behind the rest."""
    sent, plan, network = one_layer(update_s=60 / 64 * 4, method="shard_direct")
    trace = Trace("two", (Layer("l1", 0, 0, 50e6), *sent.layers), sent.update_us)
    steps = simulate_ranks(trace, plan, network, stragglers={1: 2.0}, rank=1, clip=True)
    # Backward until 2 * (2 + 50); a number takes 1 s as an op of its own; then as above.
    assert lanes(steps)["send"] == [(4, 9), (109, 114), (104, 105)]
    assert lanes(steps)["update"] == [(105, 109)]


@both
@given(seeds, st.booleans())
def test_equal_ranks_take_the_step_of_a_single_one(sharded: bool, seed: int, clip: bool):
    trace, plan, network = strategies.any_step(seed, sharded=sharded)
    steps = simulate_ranks(
        trace, plan, network, steps=3, clip=clip, rank=plan.ranks - 1, title="all of them"
    )
    alone = simulate(trace, plan, network, clip=clip, title="all of them")
    assert steps.step_s == pytest.approx([alone.step_s] * 3, rel=1e-9, abs=1e-12)
    assert steps.timeline.title == "all of them"
    assert steps.timeline.step_s == pytest.approx(alone.step_s, rel=1e-9, abs=1e-12)
    assert [s[:2] for s in spans(steps.timeline)] == [s[:2] for s in spans(alone)]
    assert flat(spans(steps.timeline)) == pytest.approx(flat(spans(alone)), rel=1e-9, abs=1e-9)


@both
@given(seeds, st.booleans(), st.lists(st.floats(0.5, 3.0), min_size=2, max_size=5))
def test_discrete_events_show_the_same_steps(
    sharded: bool, seed: int, clip: bool, factors: list[float]
):
    trace, plan, network = strategies.any_step(seed, sharded=sharded, ranks=len(factors))
    world = World(trace, plan, network, factors=factors, steps=4, clip=clip)
    began = [max(times) for times in zip(*(r.began for r in world.ranks), strict=True)]
    for rank in (0, len(factors) - 1):
        steps = simulate_ranks(
            trace, plan, network, stragglers=dict(enumerate(factors)), steps=3, clip=clip, rank=rank
        )
        # Both begin with a step in which all ranks begin at the same time.
        expected = [b - a for a, b in pairwise(began[1:])]
        assert steps.step_s == pytest.approx(expected, rel=1e-9, abs=1e-12)
        simulated, seen = spans(steps.timeline), world.seen_by(rank, 3)
        assert [span[:2] for span in simulated] == [span[:2] for span in seen]
        assert flat(simulated) == pytest.approx(flat(seen), rel=1e-9, abs=1e-9)


# Jitter.


def long_model(layers: int = 400) -> tuple[Trace, Plan, Network]:
    trace = Trace("long", tuple(Layer(f"l{i}", 64_000, 10.0, 20.0) for i in range(layers)), 500.0)
    network = Network.linear(1e-6, 1e9)
    return trace, make_plan(trace, flats_of(trace), network, ranks=16), network


def test_a_seed_gives_the_same_steps_and_another_one_others():
    trace, plan, network = long_model()
    first, again, other = (
        simulate_ranks(trace, plan, network, jitter=0.1, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.step_s != other.step_s
    assert len(set(first.step_s)) == 10, "every step is drawn by itself"


@pytest.mark.parametrize("kind", ["forward", "backward", "update"])
def test_jitter_is_the_relative_deviation_of_every_compute_time(kind):
    trace, plan, network = long_model()
    usual = {s.name: s.end_s - s.start_s for s in simulate(trace, plan, network).of(kind)}
    timeline = simulate_ranks(
        trace, plan, network, jitter=0.2, stragglers={3: 1.5}, rank=3
    ).timeline
    ratios = [(s.end_s - s.start_s) / usual[s.name] for s in timeline.of(kind)]
    # Of 400 draws the mean is known to 1.5 * 0.2 / 20, the deviation to about 5%.
    assert statistics.mean(ratios) == pytest.approx(1.5, abs=0.06)
    assert statistics.stdev(ratios) == pytest.approx(1.5 * 0.2, rel=0.2)
    assert min(ratios) > 0


def test_more_ranks_and_more_jitter_take_longer():
    """Every op waits for the last rank, and the last of many is later."""
    trace, plan, network = long_model(20)
    medians = {
        (ranks, jitter): simulate_ranks(
            trace, replace(plan, ranks=ranks), network, jitter=jitter, steps=100
        ).median_s
        for ranks in (2, 256)
        for jitter in (0.05, 0.3)
    }
    assert medians[2, 0.05] < medians[256, 0.05] < medians[256, 0.3]
    assert medians[2, 0.3] < medians[256, 0.3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stragglers": {2: 1.5}}, "rank 2 is no straggler: the ranks are 0 to 1"),
        ({"stragglers": {1: 0.0}}, "straggler 1 is to take 0.0 times as long"),
        ({"stragglers": {1: float("inf")}}, "straggler 1 is to take inf times as long"),
        ({"jitter": -0.1}, "jitter is -0.1, but must be zero or more"),
        ({"jitter": float("nan")}, "jitter is nan"),
        ({"steps": 0}, "steps is 0, but must be one or more"),
        ({"rank": 2}, "rank is 2, but must be from 0 to 1"),
    ],
)
def test_what_is_out_of_range_is_named(wrong, message: str):
    with pytest.raises(ValueError, match=message):
        simulate_ranks(*one_layer(), **wrong)


def test_a_model_that_sends_nothing_needs_nobody_else():
    trace = Trace("none", (Layer("l0", 0, 3e6, 2e6),))
    plan = Plan(2, flats_of(trace), (), ())
    for clip in (False, True):
        steps = simulate_ranks(
            trace, plan, Network.linear(1.0, 1.0), stragglers={0: 2.0}, clip=clip, steps=2
        )
        assert steps.step_s == pytest.approx([10.0, 10.0])
        assert step_time_s(trace, plan, Network.linear(1.0, 1.0), clip=clip) == pytest.approx(5.0)


def test_a_thousand_times_as_many_ranks_do_not_take_a_thousand_times_as_long():
    trace = Trace.load("resnet50")

    def taken_s(ranks: int) -> float:
        network = Network.ideal(ranks, 100e9, 1e-7)
        plan = make_plan(trace, flats_of(trace), network, ranks=ranks)
        taken: list[float] = []
        for _ in range(3):
            began = time.process_time()
            simulate_ranks(trace, plan, network, stragglers={3: 1.2}, jitter=0.1, steps=5)
            taken.append(time.process_time() - began)
        return min(taken)

    assert taken_s(4096) < 300 * taken_s(4)
