"""What is compared, and how much slower and smaller than real."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soonest.bench.arms import MAKERS
from soonest.bench.scale import Capacity, choose
from soonest.bench.settings import ARMS, KNOWN, SWEEP_MB, VARIANTS, Settings, link_for
from soonest.core.trace import Layer, Trace

ALEXNET = Trace.load("alexnet")
SETTINGS = Settings(ALEXNET, 4, 25e9, 20.0, 8.0, tuple(ARMS))


def test_settings_survive_json():
    text = json.dumps(SETTINGS.to_json())
    assert Settings.from_json(text) == SETTINGS


def test_arms_of_one_method_each_are_known_but_not_compared_by_default():
    assert {"soonest-allreduce", "soonest-gather", "soonest-exchange", "soonest-split"} <= set(
        VARIANTS
    )
    assert not set(VARIANTS) & set(ARMS)
    assert set(KNOWN) == {*ARMS, *VARIANTS} == set(MAKERS)


def test_the_emulated_links_are_slower_by_both_factors():
    assert SETTINGS.shaped_bps == 25e9 / 160


@pytest.mark.parametrize("load", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_links_are_found_for_a_load(hosts: int, load: float):
    settings = replace(SETTINGS, hosts=hosts, link_bps=link_for(ALEXNET, hosts, load))
    assert settings.communication_s == pytest.approx(
        load * (ALEXNET.forward_s + ALEXNET.backward_s)
    )


@pytest.mark.parametrize(
    ("layer", "why"),
    [(Layer("a", 4, 0.0, 0.0), "computes nothing"), (Layer("a", 0, 1.0, 1.0), "sends nothing")],
)
def test_there_is_no_link_for_a_load_of_nothing(layer: Layer, why: str):
    with pytest.raises(ValueError, match=f"trace 't' {why}: give the rate of the links"):
        link_for(Trace("t", (layer,)), 2, 1.0)


def test_bucket_sizes_that_all_hold_the_whole_model_are_tried_once():
    def swept(size_mb: float) -> list[str]:
        trace = Trace("t", (Layer("a", int(size_mb * (1 << 20)), 1.0, 1.0),))
        return list(replace(SETTINGS, trace=trace).sweep())

    assert swept(300.0) == list(SWEEP_MB)
    assert swept(30.0) == ["default", "1 MB", "5 MB", "50 MB"]
    assert swept(0.5) == ["default"]


def test_the_bound_knows_that_updates_are_not_in_slow_motion():
    slow = replace(SETTINGS, trace=replace(ALEXNET, update_us=1e6))
    assert slow.bound_s == SETTINGS.bound_s


positive = st.floats(1e-6, 1e-2)


@given(
    layer_s=positive,
    op_s=positive,
    bytes_per_s=st.floats(1e6, 1e10),
    hosts=st.integers(2, 64),
    link_bps=st.floats(1e6, 1e12),
    size=st.integers(4, 1 << 31),
    compute_us=st.floats(0.0, 1e6),
)
def test_what_is_chosen_can_be_carried(
    layer_s: float,
    op_s: float,
    bytes_per_s: float,
    hosts: int,
    link_bps: float,
    size: int,
    compute_us: float,
):
    capacity = Capacity(layer_s, op_s, bytes_per_s)
    trace = Trace("t", (Layer("a", size, compute_us, compute_us), Layer("b", 0, 1.0, 1.0)))
    slow_motion, shrink = choose(trace, hosts, link_bps, capacity)
    settings = Settings(trace, hosts, link_bps, slow_motion, shrink, ())
    assert math.log2(shrink) >= 0
    assert math.log2(shrink) % 1 == 0
    assert settings.bound_s * slow_motion >= 1.199
    assert settings.bound_s * slow_motion >= 80 * op_s * 0.99
    moving_s = size / shrink / bytes_per_s
    assert moving_s <= 0.26 * settings.communication_s * slow_motion
    assert size / shrink >= min(size, 2 << 20), "not shrunk beyond recognition"


def test_what_the_user_gives_stays():
    capacity = Capacity(1e-4, 1e-3, 1e8)
    assert choose(ALEXNET, 4, 25e9, capacity, slow_motion=3.0, shrink=5.0) == (3.0, 5.0)
    assert choose(ALEXNET, 4, 25e9, capacity, shrink=5.0)[1] == 5.0
    assert choose(ALEXNET, 4, 25e9, capacity, slow_motion=3.0)[0] == 3.0
