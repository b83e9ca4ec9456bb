"""What reducing costs: ideal, fitted, written and read."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.strategies import networks
from soonest.core.cost import Cost, Network
from soonest.core.plan import METHODS


def test_cost_is_latency_and_bandwidth():
    network = Network.linear(0.5, 100.0)
    assert network.cost_s("allreduce", 200) == pytest.approx(2.5)
    assert network.op("all_reduce").transfer_s(200) == pytest.approx(2.0)
    assert (network.latency_s, network.s_per_byte) == (0.5, pytest.approx(0.01))


def test_no_cost_is_made_up_for_what_is_not_known():
    network = Network.linear(0.5, 100.0)
    assert network.methods == ("allreduce",)
    for unknown in ("pigeon", "gather"):
        with pytest.raises(ValueError, match="no cost is known for op"):
            network.cost_s(unknown, 1)
    with pytest.raises(ValueError, match="all_reduce"):
        Network({"all_gather": Cost.linear(0.0, 1.0)})


@pytest.mark.parametrize(("ranks", "seconds"), [(2, 1.0), (4, 1.5), (64, 2 * 63 / 64)])
def test_ideal_is_a_ring(ranks: int, seconds: float):
    network = Network.ideal(ranks, 8e6, latency_s=1e-3)
    assert network.cost_s("allreduce", 1e6) == pytest.approx(seconds + 2e-3 * (ranks - 1))


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_ideal_methods_send_what_they_must(ranks: int):
    network = Network.ideal(ranks, 8e6, latency_s=1e-3)
    ring = 1e-3 * 2 * (ranks - 1) + 2 * (ranks - 1) / ranks
    assert network.cost_s("gather", 1e6) == pytest.approx((ranks - 1) * (1e-3 + 1))
    assert network.cost_s("exchange", 1e6) == pytest.approx(1e-3 + ranks - 1)
    assert network.cost_s("split", 1e6) == pytest.approx(2e-3 + 2 * (ranks - 1) / ranks)
    assert network.cost_s("shard", 1e6) == pytest.approx(ring)
    assert set(network.methods) == set(METHODS) - {"hierarchical"}


def test_small_is_exchanged_and_large_is_split():
    network = Network.ideal(8, 1e9, latency_s=1e-4)
    methods = ("allreduce", "exchange", "split")
    assert network.best(100, methods) == "exchange"
    assert network.best(1e6, methods) == "split"
    assert network.best(1e6, ("allreduce", "exchange")) == "allreduce"


def test_what_was_given_up_early_is_not_chosen_for_large_buckets():
    cheap_so_far = Cost((10.0, 20.0), (1.0, 1.0))
    network = Network({"all_reduce": Cost((10.0, 1000.0), (2.0, 50.0)), "exchange": cheap_so_far})
    both = ("allreduce", "exchange")
    assert [network.best(size, both) for size in (5, 20, 21, 1e6)] == [
        "exchange", "exchange", "allreduce", "allreduce"
    ]  # fmt: skip
    assert network.best(1e6, ("exchange",)) == "exchange"


def test_of_equal_methods_the_first_is_chosen():
    assert Network.ideal(4, 1e9).best(1e6, ("allreduce", "split")) == "allreduce"


def test_one_rank_has_nothing_to_send():
    assert Network.ideal(1, 1e9, latency_s=1.0).cost_s("allreduce", 1e12) == pytest.approx(0)


@pytest.mark.parametrize(("ranks", "link_bps"), [(0, 1e9), (2, 0.0), (2, math.nan)])
def test_ideal_refuses_what_cannot_be(ranks: int, link_bps: float):
    with pytest.raises(ValueError, match="above zero"):
        Network.ideal(ranks, link_bps)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (math.nan, 1.0), (0.0, 0.0), (0.0, math.inf)])
def test_costs_below_zero_are_refused(values: tuple[float, float]):
    with pytest.raises(ValueError, match="but must be"):
        Cost.linear(*values)


@pytest.mark.parametrize(
    "values",
    [
        ((), ()),
        ((1.0,), (1.0, 2.0)),
        ((2.0, 1.0), (1.0, 2.0)),
        ((-1.0,), (1.0,)),
        ((1.0, 2.0), (2.0, 1.0)),
        ((1.0,), (1.0,), 2.0),
        ((1.0,), (math.inf,)),
    ],
)
def test_what_is_no_cost_is_refused(values: tuple[tuple[float, ...], ...]):
    with pytest.raises(ValueError, match=r"needs|must"):
        Cost(*values)  # pyright: ignore[reportArgumentType]


def test_between_sizes_costs_are_linear_and_beyond_them_too():
    cost = Cost((10.0, 20.0, 40.0), (1.0, 2.0, 6.0))
    assert [cost.alone_s(size) for size in (0, 10, 15, 30, 50)] == [1.0, 1.0, 1.5, 4.0, 8.0]
    assert cost.s_per_byte == pytest.approx(0.1)
    assert cost.slowed(2.0).alone_s(30) == 8.0


@given(st.floats(1e-6, 1e-2), st.floats(1e6, 1e10), st.sets(st.integers(1, 10**9), min_size=3))
def test_fit_finds_what_the_samples_were_made_of(latency: float, bandwidth: float, sizes: set[int]):
    true = Cost.linear(latency, bandwidth)
    fitted = Cost.fit([(size, true.alone_s(size)) for size in sizes])
    for size in sizes:
        assert fitted.alone_s(size) == pytest.approx(true.alone_s(size), rel=1e-6)
    assert fitted.latency_s == pytest.approx(latency, rel=1e-3, abs=1e-9)
    assert fitted.error == 0.0


def test_fit_is_not_led_astray_by_hiccups():
    true = Cost.linear(1e-3, 1e8)
    samples = [(s, true.alone_s(s)) for s in (10**3, 10**5, 10**7) for _ in range(5)]
    samples += [(10**3, 5.0), (10**3, 3.0), (10**7, 60.0)]
    fitted = Cost.fit(samples)
    assert fitted.latency_s == pytest.approx(1e-3, rel=1e-6)
    assert fitted.alone_s(10**8) == pytest.approx(true.alone_s(10**8), rel=1e-6)


def test_fit_tells_how_far_measurements_lie_from_each_other():
    assert Cost.fit([(8, 0.9), (8, 1.0), (8, 1.1), (8, 50.0)]).error == pytest.approx(0.1, rel=0.1)


def test_what_ops_in_a_row_hide_is_latency():
    samples = [(1e3, 1e-3), (1e6, 2e-3)]
    assert Cost.fit(samples, spaced_s={1e3: 4e-4}).latency_s == pytest.approx(6e-4)
    alone_dear = Cost.fit(samples, spaced_s={1e3: 1.5e-3})  # what is fast alone does not stay so
    assert (alone_dear.latency_s, alone_dear.transfer_s(1e3)) == (0.0, pytest.approx(1.5e-3))


def test_large_ops_in_a_row_may_hide_more():
    samples = [(1e3, 1e-3), (1e6, 2e-3), (3e6, 4e-3)]
    cost = Cost.fit(samples, spaced_s={1e3: 4e-4, 1e6: 1.2e-3})
    assert cost.latency_at(1e6) == pytest.approx(8e-4)
    assert cost.transfer_s(1e6) == pytest.approx(1.2e-3)
    assert cost.latency_at(3e6) == pytest.approx(8e-4)  # nothing is known of it
    assert cost.transfer_s(5e5) == pytest.approx(0.8e-3, rel=0.01)
    twice = cost.slowed(2.0)
    assert (twice.latency_at(1e6), twice.transfer_s(1e6)) == (
        pytest.approx(8e-4),
        pytest.approx(2.4e-3),
    )
    assert Network.from_json(Network({"all_reduce": cost}).to_json()).op("all_reduce") == cost


def test_what_is_hidden_never_falls_nor_rises_faster_than_the_whole():
    samples = [(1e3, 1e-3), (1e6, 2e-3), (2e6, 2.1e-3)]
    cost = Cost.fit(samples, spaced_s={1e3: 4e-4, 1e6: 1.9e-3, 2e6: 1e-4})
    assert cost.latency_at(1e3) == cost.latency_at(1e6) == pytest.approx(3.5e-4)  # the mean
    assert cost.latency_at(2e6) == pytest.approx(4.5e-4)
    assert cost.transfer_s(2e6) == pytest.approx(cost.transfer_s(1e6))


@pytest.mark.parametrize("hidden_s", [(2e-4, 3e-4), (1e-4, 0.5e-4), (1e-4, 2e-3), (1e-4,)])
def test_refuses_hidden_times_that_cannot_be(hidden_s: tuple[float, ...]):
    with pytest.raises(ValueError, match="hidden_s"):
        Cost((1.0, 2.0), (1e-3, 2e-3), 1e-4, hidden_s=hidden_s)


@given(st.lists(st.tuples(st.integers(0, 10), st.floats(0, 10)), min_size=1))
def test_fitted_costs_never_fall(samples: list[tuple[int, float]]):
    cost = Cost.fit(samples)
    found = [cost.alone_s(size) for size in range(12)]
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(found))
    assert 0 <= cost.latency_s <= found[0]
    assert math.isfinite(cost.alone_s(10**9))


def test_fit_needs_a_sample():
    with pytest.raises(ValueError, match="no samples"):
        Cost.fit([])


@given(networks)
def test_json_round_trip(network: Network):
    assert Network.from_json(json.loads(json.dumps(network.to_json()))) == network


@pytest.mark.parametrize(
    "data", [{"latency_s": 1.0}, {"all_reduce": {"seconds": []}}, {"all_reduce": 1}, []]
)
def test_broken_json_is_refused(data: dict):
    with pytest.raises(ValueError, match="no network"):
        Network.from_json(data)


@given(
    st.lists(st.floats(1e-6, 10.0), min_size=2, max_size=9),
    st.lists(st.floats(1e-6, 10.0), min_size=9, max_size=9),
    st.floats(0.01, 100.0),
)
def test_whatever_was_measured_can_be_slowed(
    alone_s: list[float], spaced_s: list[float], factor: float
):
    sizes = [1024.0 * 4**power for power in range(len(alone_s))]
    spaced = dict(zip(sizes, spaced_s, strict=False))
    cost = Cost.fit(zip(sizes, alone_s, strict=True), spaced_s=spaced)
    slower = cost.slowed(factor)
    for size in sizes:
        assert slower.transfer_s(size) == pytest.approx(factor * cost.transfer_s(size), abs=1e-9)
        assert slower.latency_at(size) == pytest.approx(cost.latency_at(size))


def test_times_that_fall_are_replaced_by_the_mean_of_all_of_them():
    """4, 1 and 1 have the mean 2; not that of 2.5, which 4 and 1 have, and 1."""
    cost = Cost.fit([(1.0, 4.0), (2.0, 1.0), (3.0, 1.0)])
    assert cost.seconds == pytest.approx((2.0, 2.0, 2.0))
    cost = Cost.fit([(1.0, 1.0), (2.0, 6.0), (3.0, 2.0), (4.0, 1.0), (5.0, 9.0)])
    assert cost.seconds == pytest.approx((1.0, 3.0, 3.0, 3.0, 9.0))
