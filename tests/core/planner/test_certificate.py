"""How near plans come to the shortest step of all, on small models where that can be found.

The optimum is over all plans that the planner may choose from, chosen jointly: every way to group
neighbouring *atoms* of each flat buffer into buckets, every method of each bucket, every order of
all ops, and every window allowed. An atom is what lies between two cut points: one parameter, or,
in the regime "sliced", a third or so of the largest one, as ``cut_points`` says. Times are those of
the simulator: ops issued in order, a window, latencies that pass while others transfer, one
transfer at a time, updates layer by layer (none in the regime "sharded"). Each optimum is proven by
OR-tools CP-SAT, and the plan that attains it is run through the simulator.
"""

from functools import cache
from itertools import combinations, pairwise, product
from statistics import median

import pytest

from helpers.exact import REGIMES, Model, draw_model, shortest_step
from soonest.core.plan import Plan
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.planner.initial_orders import dispatched
from soonest.core.planner.planner import best_plan
from soonest.core.planner.search_space import Space
from soonest.core.simulator.simulate import step_time_s

SEEDS = range(17)
SAME = 1e-9


@cache
def optimum(regime: str, seed: int) -> tuple[Model, float, Plan]:
    model = draw_model(regime, seed)
    return model, *shortest_step(model)


@cache
def planned_s(regime: str, seed: int) -> float:
    model = draw_model(regime, seed)
    plan = best_plan(
        model.trace,
        model.flats,
        model.network,
        ranks=model.ranks,
        windows=model.windows,
        methods=model.methods,
        slice_bytes=model.slice_bytes,
    )
    return step_time_s(model.trace, plan, model.network)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_shortest_step_is_what_the_simulator_says(regime: str):
    for seed in SEEDS:
        model, best_s, plan = optimum(regime, seed)
        assert step_time_s(model.trace, plan, model.network) == pytest.approx(best_s, rel=SAME)


@pytest.mark.parametrize("regime", REGIMES)
def test_no_plan_is_three_percent_longer_than_the_shortest(regime: str):
    for seed in SEEDS:
        _, best_s, _ = optimum(regime, seed)
        assert best_s * (1 - SAME) <= planned_s(regime, seed) <= 1.03 * best_s, seed


def test_half_of_the_plans_are_as_good_as_the_shortest():
    ratios = [planned_s(r, seed) / optimum(r, seed)[1] for r, seed in product(REGIMES, SEEDS)]
    assert len(ratios) >= 200
    assert median(ratios) <= 1.005


@pytest.mark.parametrize("regime", REGIMES)
def test_the_shortest_step_is_not_below_the_bound(regime: str):
    for seed in SEEDS:
        model, best_s, _ = optimum(regime, seed)
        trace, network, window = model.trace, model.network, max(model.windows)
        any_plan = lower_bound_s(trace, network)
        bound = lower_bound_s(trace, network, methods=model.methods, window=window)
        assert any_plan <= bound <= best_s * (1 + SAME), seed


def layer_first_s(model: Model) -> float:
    """The shortest step of all cuts, if the first layer that is ready always goes first."""
    space = Space(
        model.trace,
        model.flats,
        model.network,
        ranks=model.ranks,
        methods=model.methods,
        slice_bytes=model.slice_bytes,
    )
    steps: list[float] = []
    per_flat = [
        [
            (0, *inner, len(points) - 1)
            for count in range(len(points) - 1)
            for inner in combinations(range(1, len(points) - 1), count)
        ]
        for points in space.points
    ]
    for cuts in product(*per_flat):
        pieces = [space.cheapest(i, a, b) for i, at in enumerate(cuts) for a, b in pairwise(at)]
        order = dispatched(space, pieces)
        steps.append(space.timer.step_s(order, max(model.windows)))
    return min(steps)


@pytest.mark.parametrize("regime", ["near", "slow network", "late", "out of order"])
def test_layer_first_is_not_always_the_best_order_and_then_beaten(regime: str):
    """Even with the best cut for it: it sends a large piece just before an urgent one is ready."""
    gains = [layer_first_s(draw_model(regime, seed)) / planned_s(regime, seed) for seed in SEEDS]
    assert min(gains) >= 1 - 1e-4
    assert max(gains) > 1.02
    assert sum(gain > 1.001 for gain in gains) >= 2
