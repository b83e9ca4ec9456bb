"""What combining a tensor over the ranks costs, fitted from measurements or taken as ideal."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

MAX_BYTES_PER_S = 1e30
"""As good as infinite, but finite, so that JSON can carry it."""
_TINY_S = 1e-9


@dataclass(frozen=True, slots=True)
class Network:
    """Cost of an all-reduce on the group at hand: ``latency_s + size_bytes / bytes_per_s``.

    Args:
        latency_s: cost of a tensor of no size, seconds.
        bytes_per_s: bytes of the *tensor* combined per second; this is not the rate of a link.

    Raises:
        ValueError: the latency is negative or the bandwidth is not above zero.
    """

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(f"latency_s is {self.latency_s!r}, but must be zero or more")
        if not 0 < self.bytes_per_s < math.inf:
            raise ValueError(f"bytes_per_s is {self.bytes_per_s!r}, but must be above zero")

    def transfer_s(self, method: str, size_bytes: float) -> float:
        """Seconds for which one op keeps the network to itself: the cost without the latency."""
        if method != "allreduce":
            raise ValueError(f"no cost is known for method {method!r}, only for 'allreduce'")
        return size_bytes / self.bytes_per_s

    def cost_s(self, method: str, size_bytes: float) -> float:
        """Seconds that one op takes on an idle network."""
        return self.latency_s + self.transfer_s(method, size_bytes)

    @classmethod
    def ideal(cls, ranks: int, link_bps: float, latency_s: float = 0.0) -> Network:
        """A ring all-reduce over links that do nothing else.

        Each of its 2(n-1) rounds sends 1/n of the tensor over every link.

        Args:
            ranks: how many.
            link_bps: *bits* per second of each link, per direction.
            latency_s: of one message, seconds.
        """
        if ranks < 1 or not link_bps > 0:
            raise ValueError(f"{ranks} ranks on links of {link_bps} bit/s: both must be above zero")
        if ranks == 1:
            return cls(0.0, MAX_BYTES_PER_S)
        rounds = 2 * (ranks - 1)
        return cls(rounds * latency_s, link_bps * ranks / (8 * rounds))

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, float]]) -> Network:
        """Fits latency and bandwidth to measured all-reduces.

        The median per size keeps single hiccups out. Least squares of the *relative* errors let
        small tensors decide the latency and large ones the bandwidth.

        Args:
            samples: ``(size_bytes, seconds)``, at least one, in any order, sizes repeated at will.
        """
        if not samples:
            raise ValueError("a network cannot be fitted to no samples: measure at least one size")
        by_size: defaultdict[int, list[float]] = defaultdict(list)
        for size, seconds in samples:
            by_size[size].append(seconds)
        points = [(float(s), max(median(seconds), _TINY_S)) for s, seconds in by_size.items()]
        # Minimise the sum of ((latency + size * per_byte) / seconds - 1)^2.
        w = sum(1 / t**2 for _, t in points)
        ws = sum(s / t**2 for s, t in points)
        wss = sum(s * s / t**2 for s, t in points)
        wt = sum(1 / t for _, t in points)
        wst = sum(s / t for s, t in points)
        determinant = w * wss - ws * ws
        if determinant > 1e-12 * w * wss:
            latency = max((wt * wss - ws * wst) / determinant, _TINY_S)
        else:  # One size only tells no latency from bandwidth.
            latency = _TINY_S if wss else wt / w
        per_byte = (wst - ws * latency) / wss if wss else 0.0
        if per_byte < 1 / MAX_BYTES_PER_S:  # Larger tensors took no longer.
            latency, per_byte = wt / w, 1 / MAX_BYTES_PER_S
        return cls(latency, 1 / per_byte)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Network:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: a field is missing or unknown, or no cost.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"this is no network: {error}") from None


_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def parse_rate(text: str) -> float:
    """Bits per second of ``318mbit``, ``2.5Gbit`` or ``25gbit``.

    As in ``tc``, a bare number is bits per second, and ``mbps`` is mega*bytes* per second.
    """
    match = re.fullmatch(r"([\d.]+)([kmgt]?)(bit|bps)?", text.strip().lower())
    number = _number(match[1]) if match else None
    if match is None or not number or (match[2] and not match[3]):
        raise ValueError(f"{text!r} is no rate: give for example 318mbit, 2.5gbit or 100kbit")
    return number * _PREFIXES[match[2]] * (8 if match[3] == "bps" else 1)


def parse_duration(text: str) -> float:
    """Seconds of ``11us``, ``1.5ms``, ``2s`` or ``0``."""
    match = re.fullmatch(r"([\d.]+)\s*(ns|us|µs|ms|s)?", text.strip().lower())
    number = _number(match[1]) if match else None
    if match is None or number is None or (number and not match[2]):
        raise ValueError(f"{text!r} is no duration: give for example 11us, 1.5ms or 2s")
    return number * _SECONDS[match[2] or "s"]


def _number(digits: str) -> float | None:
    try:
        return float(digits)
    except ValueError:
        return None
