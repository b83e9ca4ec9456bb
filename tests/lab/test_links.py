"""How links are shaped, by numbers that are worked out by hand; no lab is made."""

import pytest

from soonest.lab import links
from soonest.lab.links import Links, address, check_host, check_rate


def shape(bps):
    words = links._shape(bps).split()
    assert words[:2] == ["root", "tbf"]
    return dict(zip(words[2::2], words[3::2], strict=True))


@pytest.mark.parametrize(
    ("bps", "burst", "queue"),
    [
        # 1 ms of 1 Gbit/s are 125,000 bytes; packets of up to 62,500; 50 ms are 6,250,000.
        (1e9, 125_000, 6_250_000),
        # 1 ms of 100 Mbit/s are 12,500 bytes, 50 ms 625,000.
        (100e6, 12_500, 625_000),
        # 1 ms of 10 Mbit/s are 1,250 bytes: two packets of the least size, 12,000, are more.
        (10e6, 12_000, 62_500),
        # 50 ms of 1 Mbit/s are 6,250 bytes: 32 KiB are more.
        (1e6, 12_000, 32_768),
        # Packets have 64 KiB at most, and 1 ms of 10 Gbit/s is more than two of them.
        (10e9, 1_250_000, 62_500_000),
    ],
)
def test_a_link_sends_a_millisecond_at_once_and_queues_fifty(bps, burst, queue):
    assert shape(bps) == {
        "rate": f"{bps:.0f}bit",
        "burst": f"{burst}b",
        "limit": f"{burst + queue}b",
    }


@pytest.mark.parametrize(
    ("bps", "size"), [(1e6, 6000), (100e6, 6250), (1e9, 62_500), (1e11, 65_536)]
)
def test_packets_are_half_a_burst(bps, size):
    assert links._packet_bytes(bps) == size


def test_addresses_and_their_limits():
    assert [address(host) for host in (0, 1, 253, 254, 255, 999)] == [
        "10.77.0.1", "10.77.0.2", "10.77.0.254", "10.77.0.255", "10.77.1.0", "10.77.3.232",
    ]  # fmt: skip
    check_host(0, 2)
    check_host(1, 2)
    for host in (-1, 2):
        with pytest.raises(ValueError, match="hosts 0 to 1"):
            check_host(host, 2)
    check_rate(1e3)
    for bps in (999, 1e12, float("nan")):
        with pytest.raises(ValueError, match="rates are"):
            check_rate(bps)


@pytest.fixture
def told(monkeypatch):
    """What is told to the tools, by namespace and tool."""
    found = {}
    monkeypatch.setattr(
        links,
        "configure",
        lambda where, tool, lines: found.setdefault((where, tool), []).extend(lines),
    )
    return found


def test_each_host_sends_at_its_own_rate_and_receives_at_the_common_one(told):
    Links(["one", "two", "switch"]).connect(1e9, [1e8, 2e8])
    assert told["one", "tc"] == [f"qdisc add dev eth0 {links._shape(1e8)}"]
    assert told["two", "tc"] == [f"qdisc add dev eth0 {links._shape(2e8)}"]
    assert told["switch", "tc"] == [f"qdisc add dev port{n} {links._shape(1e9)}" for n in (0, 1)]
    assert (
        "neigh add 10.77.0.2 lladdr 02:00:0a:4d:00:02 dev eth0 nud permanent" in (told["one", "ip"])
    )
    assert not [line for line in told["one", "ip"] if "neigh add 10.77.0.1 " in line]


def test_a_link_changes_in_both_directions(told):
    Links(["one", "two", "switch"]).set_rate(1, 5e7)
    assert told["two", "tc"] == [f"qdisc change dev eth0 {links._shape(5e7)}"]
    assert told["switch", "tc"] == [f"qdisc change dev port1 {links._shape(5e7)}"]
    assert told["two", "ip"] == ["link set eth0 gso_max_size 6000"]


def test_a_link_is_cut_and_mended_at_the_switch(told):
    made = Links(["one", "two", "switch"])
    made.cut(1)
    made.mend(0)
    assert told == {("switch", "ip"): ["link set port1 down", "link set port0 up"]}
