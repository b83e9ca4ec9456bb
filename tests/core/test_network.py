"""The cost of an all-reduce: ideal, fitted, written and read; rates and durations in words."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soonest.core.network import Network, parse_duration, parse_rate
from strategies import networks


def test_cost_is_latency_and_bandwidth():
    network = Network(0.5, 100.0)
    assert network.cost_s("allreduce", 200) == 2.5
    assert network.transfer_s("allreduce", 200) == 2.0


def test_no_cost_is_made_up_for_other_methods():
    with pytest.raises(ValueError, match="'pigeon'"):
        Network(0.5, 100.0).cost_s("pigeon", 1)


@pytest.mark.parametrize(("ranks", "seconds"), [(2, 1.0), (4, 1.5), (64, 2 * 63 / 64)])
def test_ideal_is_a_ring(ranks: int, seconds: float):
    network = Network.ideal(ranks, 8e6, latency_s=1e-3)
    assert network.cost_s("allreduce", 1e6) == pytest.approx(seconds + 2e-3 * (ranks - 1))


def test_one_rank_has_nothing_to_send():
    assert Network.ideal(1, 1e9, latency_s=1.0).cost_s("allreduce", 1e12) == pytest.approx(0)


@pytest.mark.parametrize(("ranks", "link_bps"), [(0, 1e9), (2, 0.0), (2, math.nan)])
def test_ideal_refuses_what_cannot_be(ranks: int, link_bps: float):
    with pytest.raises(ValueError, match="above zero"):
        Network.ideal(ranks, link_bps)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (math.nan, 1.0), (0.0, 0.0), (0.0, math.inf)])
def test_costs_below_zero_are_refused(values: tuple[float, float]):
    with pytest.raises(ValueError, match="but must be"):
        Network(*values)


@given(st.floats(1e-6, 1e-2), st.floats(1e6, 1e10), st.sets(st.integers(1, 10**9), min_size=3))
def test_fit_finds_what_the_samples_were_made_of(latency: float, bandwidth: float, sizes: set[int]):
    true = Network(latency, bandwidth)
    fitted = Network.fit([(size, true.cost_s("allreduce", size)) for size in sizes])
    for size in sizes:
        assert fitted.cost_s("allreduce", size) == pytest.approx(
            true.cost_s("allreduce", size), rel=1e-3
        )


def test_fit_is_not_led_astray_by_hiccups():
    true = Network(1e-3, 1e8)
    samples = [(s, true.cost_s("allreduce", s)) for s in (10**3, 10**5, 10**7) for _ in range(5)]
    samples += [(10**3, 5.0), (10**3, 3.0), (10**7, 60.0)]
    fitted = Network.fit(samples)
    assert fitted.latency_s == pytest.approx(1e-3, rel=1e-6)
    assert fitted.bytes_per_s == pytest.approx(1e8, rel=1e-6)


def test_fit_weighs_errors_by_size():
    """A large tensor a tenth slower than the line must not move the latency by a tenth of that."""
    true = Network(1e-3, 1e8)
    samples = [(s, true.cost_s("allreduce", s)) for s in (10**2, 10**3, 10**4, 10**6, 10**8)]
    samples[-1] = (10**8, samples[-1][1] * 1.1)
    assert Network.fit(samples).latency_s == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize(
    "samples",
    [
        [(1000, 1e-3)],
        [(0, 1e-3)],
        [(1000, 0.0)],
        [(10, 1e-3), (10**6, 1e-4)],
        [(10, 1e-9), (10**6, 1.0)],
        [(10**6, 1e-2), (2 * 10**6, 3e-2)],
    ],
)
def test_fit_of_degenerate_samples_is_a_usable_network(samples: list[tuple[int, float]]):
    network = Network.fit(samples)
    assert network.latency_s > 0
    assert math.isfinite(network.cost_s("allreduce", 10**9))
    if len(samples) == 1:
        size, seconds = samples[0]
        assert network.cost_s("allreduce", size) == pytest.approx(seconds, abs=1e-8)


def test_fit_needs_a_sample():
    with pytest.raises(ValueError, match="no samples"):
        Network.fit([])


@given(networks)
def test_json_round_trip(network: Network):
    assert Network.from_json(json.loads(json.dumps(network.to_json()))) == network


@pytest.mark.parametrize("data", [{}, {"latency_s": 1.0}, {"latency_s": "x", "bytes_per_s": 1.0}])
def test_broken_json_is_refused(data: dict):
    with pytest.raises(ValueError, match="no network"):
        Network.from_json(data)


@pytest.mark.parametrize(
    ("text", "bps"),
    [
        ("318mbit", 318e6),
        ("2.5Gbit", 2.5e9),
        ("25gbit", 25e9),
        ("64kbit", 64e3),
        ("9600bit", 9600),
        (" 1tbit ", 1e12),
        ("1000", 1000),
        ("10mbps", 80e6),
    ],
)
def test_rates(text: str, bps: float):
    assert parse_rate(text) == pytest.approx(bps)


@pytest.mark.parametrize("text", ["", "fast", "0mbit", "-1mbit", "5m", "1.2.3mbit", ".", "1mbyte"])
def test_what_is_no_rate(text: str):
    with pytest.raises(ValueError, match="is no rate: give for example"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("11us", 11e-6), ("11µs", 11e-6), ("1.5ms", 1.5e-3), ("2 s", 2), ("80NS", 8e-8), ("0", 0)],
)
def test_durations(text: str, seconds: float):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "11", "-1us", "1.2.3ms", "5m"])
def test_what_is_no_duration(text: str):
    with pytest.raises(ValueError, match="is no duration: give for example"):
        parse_duration(text)
