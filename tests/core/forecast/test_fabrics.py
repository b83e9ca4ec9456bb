"""Networks of any number of hosts."""

import math

import pytest

from soonest.core.cost import Cost, Network
from soonest.core.forecast.fabrics import (
    DIRECT_SHARE,
    FABRICS,
    TREE_SHARE,
    Calibrated,
    Links,
    named,
)

LINKS = Links(8e9, 10e-6)
"""A gigabyte and, in a message, 10 µs."""


def test_without_latency_links_are_ideal():
    for hosts in (1, 2, 3, 64):
        ideal, links = Network.ideal(hosts, 8e9), Links(8e9).network(hosts)
        for kind in ideal.costs:
            assert links.op(kind).alone_s(1e6) == pytest.approx(ideal.op(kind).alone_s(1e6))


def test_a_small_all_reduce_goes_along_a_tree_and_a_large_one_round_the_ring():
    all_reduce = LINKS.network(64).op("all_reduce")
    assert all_reduce.alone_s(0) == pytest.approx(2 * 6 * 10e-6)
    assert all_reduce.alone_s(1e3) == pytest.approx(2 * 6 * 10e-6 + 2 * 1e-6 / TREE_SHARE)
    ring_s = 2 * 63 * 10e-6 + 2 * 63 / 64 * 1.0
    assert all_reduce.alone_s(1e9) == pytest.approx(ring_s)


@pytest.mark.parametrize("hosts", [2, 3, 5, 4096])
@pytest.mark.parametrize("size", [0.0, 1e4, 1e6, 1e8])
def test_the_cheaper_of_ring_and_tree(hosts: int, size: float):
    ring_s = 2 * (hosts - 1) * 10e-6 + 2 * (hosts - 1) / hosts * size / 1e9
    tree_s = 2 * math.ceil(math.log2(hosts)) * 10e-6 + 2 * size / TREE_SHARE / 1e9
    assert LINKS.network(hosts).op("all_reduce").alone_s(size) == pytest.approx(min(ring_s, tree_s))


def test_many_messages_at_once_keep_their_sender_busy():
    two, many = (LINKS.network(hosts).op("exchange").alone_s(0) for hosts in (2, 102))
    assert two == pytest.approx(10e-6)
    assert many == pytest.approx(10e-6 * (1 + 100 * DIRECT_SHARE))


def test_faster_and_later():
    assert LINKS.faster(2).network(4).cost_s("allreduce", 1e9) < 1.0
    assert LINKS.with_latency(0).network(4).latency_s == 0
    with pytest.raises(ValueError, match="must be above zero"):
        Links(0.0)


MEASURED = Network(
    {
        "all_reduce": Cost((1e3, 1e6, 1e9), (2e-3, 4e-3, 1.5), 1e-3),
        "exchange": Cost((1e3, 1e6), (1e-3, 9e-3), 5e-4),
        "reduce_inside": Cost.linear(0, 1e9),
    }
)


def test_a_calibration_holds_where_it_was_measured():
    taken = Calibrated(MEASURED, 4).network(4)
    assert taken.op("all_reduce").seconds == pytest.approx(MEASURED.op("all_reduce").seconds)
    assert taken.op("exchange").latency_s == pytest.approx(5e-4)
    assert list(taken.costs) == ["all_reduce", "exchange"], "what is inside hosts is left out"


def test_a_calibration_is_taken_to_other_numbers_of_hosts():
    before, after = MEASURED, Calibrated(MEASURED, 4).network(16)
    assert after.op("all_reduce").latency_s == pytest.approx(5 * 1e-3)
    # A ring carries 15/16 instead of 3/4 of it, twice; an exchange 15 instead of 3 times all.
    assert after.op("all_reduce").s_per_byte == pytest.approx(
        before.op("all_reduce").s_per_byte * (15 / 16) / (3 / 4)
    )
    assert after.op("exchange").s_per_byte == pytest.approx(5 * before.op("exchange").s_per_byte)
    assert Calibrated(MEASURED, 4).network(1).cost_s("allreduce", 1e9) == 0


def test_a_calibration_with_other_links():
    calibrated = Calibrated(MEASURED, 4)
    faster = calibrated.faster(2).network(4).op("all_reduce")
    assert faster.s_per_byte == pytest.approx(MEASURED.op("all_reduce").s_per_byte / 2)
    assert faster.latency_s == pytest.approx(1e-3)
    assert calibrated.with_latency(0).network(4).op("all_reduce").latency_s == 0


def test_reading_a_calibration():
    bare = MEASURED.to_json()
    assert Calibrated.from_json(bare, ranks=4) == Calibrated(MEASURED, 4)
    assert Calibrated.from_json({"ranks": 8, "network": bare, "layers": []}).hosts == 8
    with pytest.raises(ValueError, match="give --ranks"):
        Calibrated.from_json(bare)
    with pytest.raises(ValueError, match="two ranks or more"):
        Calibrated.from_json(bare, ranks=1)
    with pytest.raises(ValueError, match="no network"):
        Calibrated.from_json({"layers": []}, ranks=4)


def test_known_fabrics():
    assert named("25gbe") is FABRICS["25gbe"]
    assert all(name == fabric.name and fabric.source for name, fabric in FABRICS.items())
    with pytest.raises(ValueError, match="no fabric 'fast': there are 1gbe, 10gbe"):
        named("fast")
