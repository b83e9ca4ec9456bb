"""What each method of reducing a tensor costs by size, and where which is the cheapest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from soonest.bench.progress import Work
from soonest.bench.result import BUSY, machine
from soonest.core.plan import shards
from soonest.core.units import rate_text, size_text

SIZES = tuple(1024 * 4**power for power in range(7))
"""Bytes of the tensor, 1 KiB to 4 MiB."""
TYPE, ITEM_BYTES = "float", 4
"""Of an element, as nccl-tests calls it, and its bytes."""
BASELINE = "allreduce"
"""The backend's own."""
DROPPED, DROPPED_FROM = 4.0, 256 << 10
"""A method that costs so many times as much as the cheapest, at so many bytes or more, is not
measured with still more."""
_LATENCY_S = 5e-3
"""About what reducing next to nothing takes."""


def repetitions(size_bytes: int) -> int:
    """How often each method is measured: large tensors take long, and vary less."""
    if size_bytes <= 64 << 10:
        return 9
    return 5 if size_bytes <= 512 << 10 else 3


def kept(methods: Sequence[str], size_bytes: int, cost_s: Mapping[str, float]) -> list[str]:
    """The methods that are worth measuring with still larger tensors.

    Args:
        methods: that have been measured.
        size_bytes: with so large tensors.
        cost_s: what they took, seconds.
    """
    if size_bytes < DROPPED_FROM:
        return list(methods)
    most_s = DROPPED * min(cost_s.values())
    return [method for method in methods if method == BASELINE or cost_s[method] <= most_s]


class Measuring(Work):
    """How much of the measuring is done.

    Args:
        link_bps: of the links, bits per second.
    """

    def __init__(self, link_bps: float) -> None:
        self._once_s = {size: _LATENCY_S + 8 * size / link_bps for size in SIZES}
        self._shown = 0.0
        super().__init__(sum(repetitions(size) * once_s for size, once_s in self._once_s.items()))

    def take(self, message: Mapping[str, Any]) -> bool:
        """Takes note of what a rank told; whether that is worth showing."""
        if message["kind"] == "warm":  # starting takes long, and says nothing of the rest
            self._began_s = time.monotonic()
        if message["kind"] != "repeated":
            return False
        size = message["size_bytes"]
        self._done_s += self._once_s[size]
        doing = f"{size_text(size)} by every method"
        if doing == self.doing and self.share < min(1.0, self._shown + 0.05):
            return False
        self.doing, self._shown = doing, self.share
        return True


@dataclass(frozen=True)
class Choice:
    """The cheapest method for one size, of those that ``prioritize`` chooses from by itself.

    Args:
        size_bytes: of the tensor.
        method: its name.
        over_allreduce: how many times as fast as the backend's all-reduce.
    """

    size_bytes: int
    method: str
    over_allreduce: float


@dataclass(frozen=True)
class Crossover:
    """Where the choice changes.

    Args:
        size_bytes: where the two cost the same, between two sizes that were measured.
        before, after: the cheaper method below and above.
    """

    size_bytes: int
    before: str
    after: str


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Args:
        hosts: one rank each.
        link_bps: of their links, bits per second and direction.
        times_s: by size in bytes and method, seconds, each of the slowest rank; a method that was
            given up is missing.
        load: of the machine's cores by size, 0 to 1.
        seconds: that the whole took.
    """

    hosts: int
    link_bps: float
    times_s: Mapping[int, Mapping[str, Sequence[float]]]
    load: Mapping[int, float]
    seconds: float

    @classmethod
    def of_told(
        cls, hosts: int, link_bps: float, told: Iterable[Mapping[str, Any]], *, seconds: float
    ) -> Costs:
        """From the messages of the ranks."""
        sizes = {m["size_bytes"]: m for m in told if m["kind"] == "measured"}
        times_s = {size: message["times_s"] for size, message in sizes.items()}
        load = {size: message["load"] for size, message in sizes.items()}
        return cls(hosts, link_bps, times_s, load, seconds)

    @property
    def title(self) -> str:
        return f"Reducing a tensor over {self.hosts} hosts, links of {rate_text(self.link_bps)}"

    @property
    def sizes(self) -> list[int]:
        return list(self.times_s)

    @property
    def methods(self) -> list[str]:
        """All that were measured, in the order of ``METHODS``."""
        return list(self.times_s[self.sizes[0]])

    def time_s(self, size_bytes: int, method: str) -> float | None:
        """The median; None if the method was given up before."""
        times = self.times_s[size_bytes].get(method)
        return None if times is None else median(times)

    def busbw(self, size_bytes: int, time_s: float) -> float:
        """Bytes per second that each link carries in an all-reduce that takes so long.

        It is the same for every method, so that they can be compared, though some carry more.
        """
        return size_bytes / time_s * 2 * (self.hosts - 1) / self.hosts

    def chosen(self) -> list[Choice]:
        """The cheapest method of each size."""
        found: list[Choice] = []
        for size in self.sizes:
            cost_s = {name: median(times) for name, times in self.times_s[size].items()}
            best = min((name for name in cost_s if not shards(name)), key=cost_s.__getitem__)
            found.append(Choice(size, best, cost_s[BASELINE] / cost_s[best]))
        return found

    def crossovers(self) -> list[Crossover]:
        """Where the choice changes, ascending."""
        return [
            Crossover(self._meet(one, other), one.method, other.method)
            for one, other in pairwise(self.chosen())
            if one.method != other.method
        ]

    def _meet(self, one: Choice, other: Choice) -> int:
        """Where the lines of two methods cross on logarithmic axes, bytes."""

        def lead(size: int) -> float:
            before, after = (median(self.times_s[size][c.method]) for c in (one, other))
            return math.log(after / before)

        ahead, behind = lead(one.size_bytes), -lead(other.size_bytes)
        share = ahead / (ahead + behind) if ahead + behind else 0.5
        return round(one.size_bytes * (other.size_bytes / one.size_bytes) ** share)

    def busy(self) -> list[int]:
        """Sizes at which the cores, not the links, may have been what limits."""
        return [size for size, load in self.load.items() if load > BUSY]

    def to_json(self) -> dict[str, Any]:
        """The record."""
        return {
            "hosts": self.hosts,
            "link_bps": self.link_bps,
            "wire": "float32",
            "machine": machine(),
            "sizes": self.sizes,
            "rows": [
                {
                    "size_bytes": size,
                    "count": size // ITEM_BYTES,
                    "type": TYPE,
                    "method": method,
                    "time_s": median(times),
                    "times_s": list(times),
                    "algbw_bytes_per_s": size / median(times),
                    "busbw_bytes_per_s": self.busbw(size, median(times)),
                }
                for size, by_method in self.times_s.items()
                for method, times in by_method.items()
            ],
            "chosen": [
                {"size_bytes": c.size_bytes, "method": c.method, "over_allreduce": c.over_allreduce}
                for c in self.chosen()
            ],
            "crossovers": [
                {"size_bytes": c.size_bytes, "from": c.before, "to": c.after}
                for c in self.crossovers()
            ],
            "load": [{"size_bytes": size, "share": load} for size, load in self.load.items()],
            "seconds": self.seconds,
        }
