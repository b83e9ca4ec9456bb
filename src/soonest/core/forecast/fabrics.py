"""Networks of any number of hosts: by the rate of their links, by name, or from a calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

from soonest.core.cost import MAX_BYTES_PER_S, Cost, Network
from soonest.core.plan import METHODS
from soonest.core.units import rate_text

TCP_SHARE = 1448 / 1514
"""Of a link's rate, what is left for payload: TCP over IPv4 with time stamps, full frames."""
TREE_SHARE = 0.9
"""Of a link's rate, what a tree can use, see ``Links``."""
DIRECT_SHARE = 0.25
"""Of the latency of a message, for how long it keeps its sender busy, see ``Links``."""

_DIRECT = {"exchange": 1, "reduce_scatter": 1, "split": 2}
"""Ops in which every host sends to every other at once, and how often it does."""
_RINGS = {"all_reduce": 2, "ring_reduce_scatter": 1, "all_gather_parameters": 1}
"""Ops that may go round a ring or along a tree, and how often they do."""
_EACH_WHOLE = ("all_gather", "exchange")
"""Ops that carry the whole bucket to every host, not a part of it."""
_FAR_BYTES = 1e12


class Fabric(Protocol):
    """What joins the hosts. Hosts are equal, each has one link, and inside of it nothing costs."""

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        ...

    @property
    def words(self) -> str:
        """What it is and what has been assumed, in one sentence without its full stop."""
        ...

    def network(self, hosts: int) -> Network:
        """What each op costs over so many hosts."""
        ...

    def faster(self, factor: float) -> Fabric:
        """The same with links of so many times the rate."""
        ...

    def with_latency(self, factor: float) -> Fabric:
        """The same with so many times the latency; zero is allowed."""
        ...


@dataclass(frozen=True)
class Links:
    """Links of which rate and latency are known.

    What a ring or a direct exchange costs is ``Network.ideal``, with two additions that matter
    where hosts are many, for all ways of training alike:

    - An all-reduce takes a ring or a tree, whichever is the faster: 2 (n-1) messages one after the
      other at the full rate, or 2 log2(n) at ``TREE_SHARE`` of it. That is the model by which NCCL
      chooses (``src/graph/tuning.cc``; the tree: P. Sanders et al., "Two-tree algorithms for full
      bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009). Reduce-scatter and
      all-gather likewise, since NCCL 2.23.
    - Where every host sends to every other at once, each message keeps its sender busy, for an
      assumed ``DIRECT_SHARE`` of its latency: the o of D. Culler et al., "LogP: towards a realistic
      model of parallel computation", PPoPP 1993.

    Args:
        link_bps: of payload, bits per second of each link, per direction.
        latency_s: of one message.
        name: to show.
        source: of the figures, or what they assume.

    Raises:
        ValueError: these are no rate and latency.
    """

    link_bps: float
    latency_s: float = 0.0
    name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.link_bps < math.inf or not 0 <= self.latency_s < math.inf:
            raise ValueError(
                f"links of {self.link_bps} bit/s with a latency of {self.latency_s} s: the rate "
                "must be above zero and the latency not below"
            )

    @property
    def title(self) -> str:
        return self.name or f"links of {rate_text(self.link_bps)}, {self.latency_s * 1e6:g} µs"

    @property
    def words(self) -> str:
        named = f"{self.name}: " if self.name else ""
        why = f" ({self.source})" if self.source else ""
        return (
            f"{named}links that carry {rate_text(self.link_bps)} of payload and "
            f"{self.latency_s * 1e6:g} µs a message{why}; all-reduce by ring or tree, whichever "
            "is the faster"
        )

    def network(self, hosts: int) -> Network:
        """What each op costs over so many hosts.

        Raises:
            ValueError: there is no host.
        """
        costs = dict(Network.ideal(hosts, self.link_bps, self.latency_s).costs)
        for kind, rounds in _DIRECT.items():
            busy_s = rounds * max(0, hosts - 2) * DIRECT_SHARE * self.latency_s
            costs[kind] = _held(costs[kind], busy_s)
        for kind, rounds in _RINGS.items():
            costs[kind] = self._ring_or_tree(hosts, rounds)
        return Network(costs)

    def _ring_or_tree(self, hosts: int, rounds: int) -> Cost:
        if hosts == 1:
            return Cost.linear(0.0, MAX_BYTES_PER_S)
        s_per_byte = rounds * (hosts - 1) / hosts * 8 / self.link_bps
        ring_s = rounds * (hosts - 1) * self.latency_s
        tree_s = rounds * math.ceil(math.log2(hosts)) * self.latency_s
        tree_s_per_byte = rounds * 8 / (TREE_SHARE * self.link_bps)
        if tree_s >= ring_s:
            return Cost.linear(ring_s, 1 / s_per_byte)
        alike_bytes = (ring_s - tree_s) / (tree_s_per_byte - s_per_byte)
        far_bytes = 2 * alike_bytes + _FAR_BYTES
        return Cost(
            (0.0, alike_bytes, far_bytes),
            (tree_s, ring_s + alike_bytes * s_per_byte, ring_s + far_bytes * s_per_byte),
            tree_s,
        )

    def faster(self, factor: float) -> Links:
        return replace(self, link_bps=self.link_bps * factor)

    def with_latency(self, factor: float) -> Links:
        return replace(self, latency_s=self.latency_s * factor)


def _held(cost: Cost, busy_s: float) -> Cost:
    """One that keeps the network to itself for longer."""
    return replace(cost, seconds=tuple(second + busy_s for second in cost.seconds))


@dataclass(frozen=True)
class Calibrated:
    """A network that was measured with some number of hosts, taken to others.

    What does not depend on the size grows with the number of other hosts, as the messages of a ring
    and of a direct exchange do. What does depend on it grows with the bytes that a link must carry.
    With as many hosts as were measured, the costs are those measured.

    Args:
        measured: what each op costs.
        hosts: with so many, at least two.
        rate, latency: factors on the rate of links and on what does not depend on the size.

    Raises:
        ValueError: that were too few hosts.
    """

    measured: Network
    hosts: int
    rate: float = 1.0
    latency: float = 1.0

    def __post_init__(self) -> None:
        if self.hosts < 2:
            raise ValueError(
                f"a calibration of {self.hosts} rank shows nothing of the network: give one of two "
                "ranks or more"
            )

    @property
    def title(self) -> str:
        return f"network as measured on {self.hosts} ranks"

    @property
    def words(self) -> str:
        return (
            f"as measured on {self.hosts} ranks; with others, the fixed part of every op is taken "
            "to grow with the number of other ranks, the rest with the bytes that a link carries"
        )

    def network(self, hosts: int) -> Network:
        """What each op costs over so many hosts.

        Raises:
            ValueError: there is no host.
        """
        if hosts < 1:
            raise ValueError(f"{hosts} hosts: give one or more")
        known = {kind for m in METHODS if m != "hierarchical" for kind in METHODS[m]}
        costs = {k: c for k, c in self.measured.costs.items() if k in known}
        return Network({kind: self._taken(kind, cost, hosts) for kind, cost in costs.items()})

    def _taken(self, kind: str, cost: Cost, hosts: int) -> Cost:
        fixed = self.latency * (hosts - 1) / (self.hosts - 1)
        share = 1.0 if kind in _EACH_WHOLE else self.hosts / hosts
        moved = (hosts - 1) / (self.hosts - 1) * share / self.rate
        sizes, seconds = cost.sizes_bytes, cost.seconds
        slopes = [
            (t1 - t0) / (s1 - s0)
            for (s0, t0), (s1, t1) in pairwise(zip(sizes, seconds, strict=True))
        ]
        late_s = cost.latency_s
        fixed_s = max(late_s, seconds[0] - (slopes[0] if slopes else 0.0) * sizes[0])
        return Cost(
            sizes,
            tuple(accumulate((fixed * fixed_s + moved * (s - fixed_s) for s in seconds), max)),
            fixed * late_s,
            cost.error,
            tuple(fixed * late_s + moved * (hidden - late_s) for hidden in cost.hidden_s),
        )

    def faster(self, factor: float) -> Calibrated:
        return replace(self, rate=self.rate * factor)

    def with_latency(self, factor: float) -> Calibrated:
        return replace(self, latency=self.latency * factor)

    @classmethod
    def from_json(cls, data: dict[str, Any], *, ranks: int | None = None) -> Calibrated:
        """Reads a calibration, or a profile, which has one in it.

        Args:
            data: what ``Network.to_json`` or ``Handle.save_profile`` wrote.
            ranks: with how many it was measured, if it does not say so.

        Raises:
            ValueError: it is neither, or the number of ranks is not known.
        """
        network = Network.from_json(data.get("network", data))
        ranks = data.get("ranks", ranks)
        if not isinstance(ranks, int):
            raise ValueError(
                "this calibration does not say with how many ranks it was measured: give --ranks"
            )
        return cls(network, ranks)


def _ethernet(name: str, bps: float, latency_s: float) -> Links:
    return Links(
        bps * TCP_SHARE, latency_s, name, "TCP through the kernel, a typical latency assumed"
    )


_RDMA_S = 9.6e-6
"""Latency of a hop in a ring with the protocol for large messages, by NCCL's tuning table."""
_RDMA_SHARE = 0.95


def _rdma(name: str, bps: float, what: str) -> Links:
    source = f"{what}; 95% of it for payload assumed, latency of a hop from NCCL's tuning table"
    return Links(bps * _RDMA_SHARE, _RDMA_S, name, source)


_EFA_S = 20e-6
"""Latency assumed where the maker does not state one."""

FABRICS: dict[str, Links] = {
    fabric.name: fabric
    for fabric in (
        _ethernet("1gbe", 1e9, 50e-6),
        _ethernet("10gbe", 10e9, 30e-6),
        _ethernet("25gbe", 25e9, 20e-6),
        _ethernet("100gbe", 100e9, 15e-6),
        _rdma("100gbe-roce", 100e9, "RDMA over Ethernet, 100 Gbit/s"),
        _rdma("fdr-infiniband", 54.5e9, "four lanes of FDR, 54.5 Gbit/s of data"),
        _rdma("edr-infiniband", 100e9, "four lanes of EDR, 100 Gbit/s"),
        _rdma("hdr-infiniband", 200e9, "four lanes of HDR, 200 Gbit/s"),
        _rdma("ndr-infiniband", 400e9, "four lanes of NDR, 400 Gbit/s"),
        Links(100e9 * _RDMA_SHARE, _EFA_S, "aws-p3dn", "100 Gbit/s for 8 V100, latency assumed"),
        Links(400e9 * _RDMA_SHARE, _EFA_S, "aws-p4d", "400 Gbit/s EFA for 8 A100, latency assumed"),
        Links(
            3200e9 * _RDMA_SHARE, _EFA_S, "aws-p5", "3200 Gbit/s EFA for 8 H100, latency assumed"
        ),
        _rdma("azure-ndv4", 1600e9, "8 HDR links for 8 A100, 1600 Gbit/s"),
        _rdma("azure-ndv5", 3200e9, "8 NDR links for 8 H100, 3200 Gbit/s"),
    )
}
"""Well-known fabrics, by name: rates as their makers state them, per host and direction."""


def named(name: str) -> Links:
    """A well-known fabric.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in FABRICS:
        raise ValueError(f"no fabric {name!r}: there are {', '.join(FABRICS)}; or give --link")
    return FABRICS[name]
