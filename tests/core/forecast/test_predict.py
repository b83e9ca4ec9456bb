"""Predictions: what must hold as hosts, links and batches change, and the words for clear cases."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from soonest.core.cost import Cost, Network
from soonest.core.forecast.advice import advise, listed
from soonest.core.forecast.fabrics import Calibrated, Links
from soonest.core.forecast.predict import ARMS, SOONEST, Row, Scenario, predict, row_of, slowed
from soonest.core.trace import Layer, Trace

MB = 1 << 20
HOSTS = (1, 2, 8, 64, 512)
MODEL = Trace(
    "four",
    (
        Layer("a", 2 * MB, 3e3, 6e3),
        Layer("b", 10 * MB, 3e3, 6e3),
        Layer("c", 30 * MB, 3e3, 6e3),
        Layer("d", 4 * MB, 3e3, 6e3),
    ),
    update_us=500.0,
)
SLOW, FAST = Links(10e9, 20e-6), Links(1e15)


def steps(rows: list[Row], arm: str) -> list[float]:
    return [row.step_s[arm] for row in rows]


def test_one_gpu_sends_nothing():
    (row,) = predict(Scenario(MODEL, SLOW), [1])
    assert set(row.step_s) == set(ARMS)
    for step_s in row.step_s.values():
        assert step_s == pytest.approx(36.5e-3)
        assert row.speedup(step_s) == pytest.approx(1)
        assert row.efficiency(step_s) == pytest.approx(1)
    assert row.bound_s == pytest.approx(36e-3)


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_no_arm_beats_the_bound_and_steps_grow_with_hosts(wire: str):
    rows = predict(Scenario(MODEL, SLOW, wire=wire), HOSTS)
    for arm in ARMS:
        taken = steps(rows, arm)
        assert all(b >= a * (1 - 5e-3) for a, b in pairwise(taken)), arm
    for row in rows:
        # The bound is of whole updates, and fsdp2 makes but a part of them.
        assert all(row.step_s[arm] >= row.bound_s * (1 - 1e-9) for arm in ARMS if arm != "fsdp2")
        assert row.step_s["ddp-tuned"] <= row.step_s["ddp"] <= row.step_s["sequential"] + 1e-9
        assert row.step_s[SOONEST] <= row.step_s["ddp-tuned"] * (1 + 1e-9)


def test_faster_links_and_a_narrow_wire_never_hurt():
    plain = row_of(Scenario(MODEL, SLOW), 16)
    for other in (
        Scenario(MODEL, SLOW.faster(2)),
        Scenario(MODEL, SLOW, wire="float16"),
        Scenario(MODEL, SLOW.with_latency(0.5)),
    ):
        eased = row_of(other, 16)
        assert all(eased.step_s[arm] <= plain.step_s[arm] * (1 + 1e-3) for arm in ARMS)
        assert eased.bound_s <= plain.bound_s


def test_weak_scaling_keeps_the_work_of_a_gpu():
    rows = predict(Scenario(MODEL, FAST), (1, 4))
    assert rows[1].compute_s == pytest.approx(rows[0].compute_s)
    assert rows[1].speedup(rows[1].step_s["ddp"]) == pytest.approx(4, rel=1e-3)


def test_strong_scaling_shares_it():
    rows = predict(Scenario(MODEL, FAST, batch=32, global_batch=128), (1, 4))
    assert rows[0].compute_s == pytest.approx(4 * 36e-3)
    assert rows[1].compute_s == pytest.approx(36e-3)
    step_s = rows[1].step_s["ddp"]
    assert rows[1].speedup(step_s) == pytest.approx(4 * 36.125 / 36.5, rel=1e-3)
    assert rows[1].efficiency(step_s) == pytest.approx(36.125 / 36.5, rel=1e-3)


def test_gpus_of_a_host_share_its_link():
    row = row_of(Scenario(MODEL, SLOW, gpus_per_host=8), 4)
    one = row_of(Scenario(MODEL, SLOW), 4)
    assert (row.hosts, row.gpus) == (4, 32)
    assert row.step_s == one.step_s
    assert row.speedup(1.0) == pytest.approx(8 * one.speedup(1.0))
    assert row.efficiency(1.0) == pytest.approx(one.efficiency(1.0)), "it is per GPU"


@pytest.mark.parametrize(
    ("scenario", "hosts", "says"),
    [
        (Scenario(MODEL, SLOW), 0, "0 hosts: give one or more"),
        (
            Scenario(MODEL, SLOW, batch=4, global_batch=16),
            32,
            "a global batch of 16 leaves less than one sample to each of 32 GPUs",
        ),
    ],
)
def test_what_cannot_be(scenario: Scenario, hosts: int, says: str):
    with pytest.raises(ValueError, match=says):
        row_of(scenario, hosts)


def test_what_a_scenario_cannot_be():
    with pytest.raises(ValueError, match="no wire 'int8': there are float32"):
        Scenario(MODEL, SLOW, wire="int8")
    with pytest.raises(ValueError, match="a global batch needs --batch"):
        Scenario(MODEL, SLOW, global_batch=64)


def words(scenario: Scenario, hosts: tuple[int, ...] = (2, 16)) -> tuple[str, str]:
    advice = advise(scenario, predict(scenario, hosts))
    json.dumps(advice.to_json())
    return advice.limit, " ".join(advice.words)


def test_computing_limits_and_nothing_helps():
    limit, said = words(Scenario(MODEL, Links(1e13, 1e-7)))
    assert limit == "compute"
    assert "On 16 GPUs computing limits the step" in said
    assert "None of these would help by a percent" in said
    assert "soonest gains nothing over the best of its peers" in said
    assert "hides behind the backward pass" in said


def test_the_links_limit():
    limit, said = words(Scenario(slowed(MODEL, 1e-3), Links(10e9)))
    assert limit == "bandwidth"
    assert "the rate of the links limits the step" in said
    assert "for 2.00 times as many samples per second" in said
    assert "gradients in 16 bits 1.9" in said or "gradients in 16 bits 2.0" in said


def test_the_latency_limits():
    tiny = replace(MODEL, layers=tuple(replace(y, bytes=4096) for y in MODEL.layers))
    limit, said = words(Scenario(slowed(tiny, 1e-3), Links(1e13, 5e-3)))
    assert limit == "latency"
    assert "the latency of messages limits the step" in said
    assert "What would help most: no latency at all" in said


def test_what_each_change_would_gain_with_the_one_that_helps_most_in_front():
    """Links of 10 Gbit/s carry next to all of the step: twice the rate, half the bytes or twice the
    samples for each byte make it about twice as fast; there is no latency to lose."""
    scenario = Scenario(slowed(MODEL, 1e-3), Links(10e9))
    advice = advise(scenario, predict(scenario, (16,)))
    gains = {change.name: change.gain for change in advice.changes}
    assert gains == {
        "links twice as fast": pytest.approx(2, abs=0.1),
        "gradients in 16 bits": pytest.approx(2, abs=0.1),
        "twice the batch": pytest.approx(2, abs=0.1),
        "no latency at all": pytest.approx(1, abs=0.01),
    }
    assert list(gains.values()) == sorted(gains.values(), reverse=True)
    assert advice.changes[-1].name == "no latency at all"


def test_twice_the_batch_gains_nothing_where_computing_limits():
    scenario = Scenario(MODEL, Links(1e13, 1e-7))
    advice = advise(scenario, predict(scenario, (2,)))
    (gain,) = [c.gain for c in advice.changes if c.name == "twice the batch"]
    # 36 ms of computing become 72, but 0.5 ms of updates do not grow.
    assert gain == pytest.approx(2 * 36.0 / 72.0, abs=0.02)


def test_where_soonest_gains_is_told():
    balanced = Links(2 * 46 * MB * 8 / 36e-3)  # synchronizing takes about as long as computing
    _, said = words(Scenario(MODEL, balanced), (1, 2, 64))
    assert "soonest gains most over the best of its peers on 2 GPUs: 1." in said
    assert "it gains nothing on 64 GPUs" in said


def test_one_host_alone_has_nothing_to_say():
    limit, said = words(Scenario(MODEL, SLOW), (1,))
    assert limit == "compute"
    assert said == "On 1 GPU nothing goes over the network: computing takes 36.5 ms."


def test_a_calibration_will_do():
    measured = Network({"all_reduce": Cost((1e3, 1e6, 1e9), (2e-3, 4e-3, 1.5), 1e-3)})
    rows = predict(Scenario(MODEL, Calibrated(measured, 4)), (2, 4, 8))
    assert steps(rows, "ddp") == sorted(steps(rows, "ddp"))


def test_lists_in_words():
    assert listed([2]) == "2 GPUs"
    assert listed([2, 4, 8]) == "2, 4 and 8 GPUs"
