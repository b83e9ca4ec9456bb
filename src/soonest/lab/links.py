"""The network of a lab: one switch, and a link of a chosen rate from it to every host."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from soonest.core.forecast.fabrics import TCP_SHARE

INTERFACE = "eth0"
"""What a host calls its link."""

PAYLOAD_SHARE = TCP_SHARE
"""Of a link's rate, what is left for payload."""

# What a link that was idle may send at once. Less, and it loses time whenever the kernel's timer is
# late; more, and it would not look like a link of its rate to small messages.
_BURST_S = 1e-3

# The kernel hands packets of up to 64 KiB to a link. Half a burst is best: what does not fit into a
# burst would be cut to pieces at a great cost of CPU.
_PACKET_S = _BURST_S / 2
_LEAST_PACKET_BYTES, _MOST_PACKET_BYTES = 6000, 1 << 16
_QUEUE_S = 50e-3
_LEAST_QUEUE_BYTES = 32 << 10


class Links:
    """The links of a lab, which any process that may enter its namespaces can change.

    Args:
        namespaces: paths of the hosts' network namespaces, then of the switch's.
    """

    def __init__(self, namespaces: Sequence[str]) -> None:
        *self._inside, self._switch = namespaces

    def connect(self, link_bps: float, uplinks_bps: Sequence[float]) -> None:
        """Makes the switch and the links.

        Args:
            link_bps: what every host receives.
            uplinks_bps: what each host sends.

        Raises:
            RuntimeError: the kernel lacks something; the message says what to do about it.
        """
        hosts = range(len(self._inside))
        switch = ["link add switch type bridge stp_state 0 mcast_snooping 0", "link set switch up"]
        for host in hosts:
            switch += [
                f"link add port{host} type veth "
                f"peer name {INTERFACE} address {_mac(host)} netns {self._inside[host]}",
                f"link set port{host} addrgenmode none master switch up",
            ]
        configure(self._switch, "ip", switch)
        # Who is who is told, not asked for: what the hosts would learn counts towards a limit that
        # all namespaces of a machine share, and which some tens of hosts exceed.
        known = [
            f"neigh add {address(host)} lladdr {_mac(host)} dev {INTERFACE} nud permanent"
            for host in hosts
        ]
        for host in hosts:
            inside = [
                "link set lo up",
                f"addr add {address(host)}/16 dev {INTERFACE}",
                f"link set {INTERFACE} addrgenmode none up",
                *known[:host],
                *known[host + 1 :],
            ]
            configure(self._inside[host], "ip", inside)
            self._shape_inside("add", host, uplinks_bps[host])
        shapes = [f"qdisc add dev port{host} {_shape(link_bps)}" for host in hosts]
        configure(self._switch, "tc", shapes)

    def set_rate(self, host: int, bps: float) -> None:
        """Changes the rate of a host's link, both directions, also while something runs."""
        check_host(host, len(self._inside))
        check_rate(bps)
        self._shape_inside("change", host, bps)
        configure(self._switch, "tc", [f"qdisc change dev port{host} {_shape(bps)}"])

    def cut(self, host: int) -> None:
        """Unplugs a host's link; what is sent meanwhile is lost, and TCP sends it again later."""
        self._set_port(host, "down")

    def mend(self, host: int) -> None:
        """Plugs a host's link in again."""
        self._set_port(host, "up")

    def _set_port(self, host: int, state: str) -> None:
        check_host(host, len(self._inside))
        configure(self._switch, "ip", [f"link set port{host} {state}"])

    def _shape_inside(self, verb: str, host: int, bps: float) -> None:
        largest = f"link set {INTERFACE} gso_max_size {_packet_bytes(bps)}"
        configure(self._inside[host], "ip", [largest])
        configure(self._inside[host], "tc", [f"qdisc {verb} dev {INTERFACE} {_shape(bps)}"])


def address(host: int) -> str:
    """A host's address on the lab's network."""
    return f"10.77.{(host + 1) >> 8}.{(host + 1) & 255}"


def check_host(host: int, hosts: int) -> None:
    """Raises ValueError for a host that a lab of so many does not have."""
    if not 0 <= host < hosts:
        raise ValueError(f"no host {host}: this lab has hosts 0 to {hosts - 1}")


def check_rate(bps: float) -> None:
    """Raises ValueError for a rate that no link can have."""
    if not 1e3 <= bps < 1e12:
        raise ValueError(f"a link of {bps:g} bit/s: rates are 1e3 to 1e12 bits per second")


def configure(namespace: str, tool: str, lines: Sequence[str]) -> None:
    """Gives lines to ``ip`` or ``tc`` inside a namespace.

    Raises:
        RuntimeError: the tool refused one; the message says what to do about it.
    """
    done = subprocess.run(
        ["nsenter", f"--net={namespace}", tool, "-batch", "-"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[0]
        raise RuntimeError(
            f"{tool} could not set up the lab's network (it says: {said}): `soonest lab check` "
            "tells what this machine lacks"
        )


def _mac(host: int) -> str:
    return f"02:00:0a:4d:{(host + 1) >> 8:02x}:{(host + 1) & 255:02x}"


def _packet_bytes(bps: float) -> int:
    return min(max(int(bps / 8 * _PACKET_S), _LEAST_PACKET_BYTES), _MOST_PACKET_BYTES)


def _shape(bps: float) -> str:
    bytes_per_s = bps / 8
    burst = max(int(bytes_per_s * _BURST_S), 2 * _packet_bytes(bps))
    limit = burst + max(int(bytes_per_s * _QUEUE_S), _LEAST_QUEUE_BYTES)
    return f"root tbf rate {bps:.0f}bit burst {burst}b limit {limit}b"
