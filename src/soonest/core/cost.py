"""What reducing a tensor over the ranks costs, fitted from measurements or taken as ideal."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from soonest.core.fitting import TINY_S, fitted
from soonest.core.plan import METHODS

MAX_BYTES_PER_S = 1e30
"""As good as infinite, but finite, so that JSON can carry it."""
_FAR_BYTES = 1e12
"""A size beyond any bucket, as the second point of a straight line."""


@dataclass(frozen=True)
class Cost:
    """What one kind of op takes by size: linear between the sizes given, and beyond them.

    Args:
        sizes_bytes: of the bucket, ascending, at least one; below the first nothing gets cheaper.
        seconds: at these sizes, on an idle network; never falling.
        latency_s: the part of it that passes while another op transfers, at the smallest size.
        error: relative, of a single measurement; zero if nothing was measured.
        hidden_s: that part at all sizes, from ``latency_s`` on never falling, and neither does what
            is left; if empty, it is the same at all.

    Raises:
        ValueError: these are no costs.
    """

    sizes_bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    latency_s: float = 0.0
    error: float = 0.0
    hidden_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.sizes_bytes) == len(self.seconds) > 0:
            raise ValueError("a cost needs sizes and as many times")
        if any(b <= a for a, b in pairwise(self.sizes_bytes)) or self.sizes_bytes[0] < 0:
            raise ValueError(f"sizes {self.sizes_bytes} must be ascending, from zero or more")
        if any(b < a for a, b in pairwise(self.seconds)):
            raise ValueError(f"times {self.seconds} must not fall as sizes grow")
        if not 0 <= self.latency_s <= self.seconds[0] or not math.isfinite(self.seconds[-1]):
            raise ValueError(
                f"latency_s is {self.latency_s!r}, but must be from zero to the time of the "
                f"smallest size, {self.seconds[0]!r}"
            )
        if len(self.hidden_s) not in (0, len(self.seconds)):
            raise ValueError("hidden_s of a cost needs as many times as seconds, or none")
        if self.hidden_s:
            left_s = [t - h for t, h in zip(self.seconds, self.hidden_s, strict=True)]
            if self.hidden_s[0] != self.latency_s or any(
                b < a - TINY_S for part in (self.hidden_s, left_s) for a, b in pairwise(part)
            ):
                raise ValueError(
                    f"hidden_s {self.hidden_s} must rise from latency_s, and seconds by more"
                )

    @classmethod
    def linear(cls, latency_s: float, bytes_per_s: float) -> Cost:
        """``latency_s + size / bytes_per_s``.

        Args:
            latency_s: of a bucket of no size, all of it hidden behind others' transfers.
            bytes_per_s: bytes of the *bucket* reduced per second; this is not the rate of a link.
        """
        if not 0 <= latency_s < math.inf:
            raise ValueError(f"latency_s is {latency_s!r}, but must be zero or more")
        if not 0 < bytes_per_s < math.inf:
            raise ValueError(f"bytes_per_s is {bytes_per_s!r}, but must be above zero")
        # Far beyond any bucket, so that nothing is lost in the difference to the latency.
        far = max(_FAR_BYTES, 1e3 * latency_s * bytes_per_s)
        return cls((0.0, far), (latency_s, latency_s + far / bytes_per_s), latency_s)

    @classmethod
    def fit(
        cls,
        samples: Iterable[tuple[float, float]],
        *,
        spaced_s: Mapping[float, float] | None = None,
    ) -> Cost:
        """Fits measured times: medians per size, outliers dropped, made never falling.

        Args:
            samples: ``(size_bytes, seconds)``, at least one, in any order, sizes repeated at will.
            spaced_s: by size, the time from op to op if there is always another in flight; what is
                missing to the time of one alone is hidden, and none alone takes less. It must have
                the smallest size. Without it, all is latency that is left of a line through the two
                smallest sizes at no size.
        """
        return cls(*fitted(samples, spaced_s))

    def alone_s(self, size_bytes: float) -> float:
        """Seconds that an op takes on an idle network."""
        return self._at(size_bytes, self.seconds)

    def latency_at(self, size_bytes: float) -> float:
        """Seconds of it that pass while another op transfers."""
        return self._at(size_bytes, self.hidden_s) if self.hidden_s else self.latency_s

    def transfer_s(self, size_bytes: float) -> float:
        """Seconds for which an op keeps the network to itself."""
        return self.alone_s(size_bytes) - self.latency_at(size_bytes)

    def _at(self, size_bytes: float, values: Sequence[float]) -> float:
        """Linear between the sizes and beyond the last one."""
        sizes = self.sizes_bytes
        if size_bytes <= sizes[0] or len(sizes) == 1:
            return values[0]
        right = min(bisect_right(sizes, size_bytes), len(sizes) - 1)
        slope = (values[right] - values[right - 1]) / (sizes[right] - sizes[right - 1])
        return values[right - 1] + (size_bytes - sizes[right - 1]) * slope

    @property
    def s_per_byte(self) -> float:
        """The least that one more byte costs, where ops follow each other."""
        if len(self.sizes_bytes) == 1:
            return 0.0
        points = pairwise((size, self.transfer_s(size)) for size in self.sizes_bytes)
        return min((t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in points)

    def slowed(self, factor: float) -> Cost:
        """The same cost with transfers that take so many times as long; latencies do not change."""
        hidden_s = self.hidden_s or (self.latency_s,) * len(self.seconds)
        seconds = tuple(
            late + factor * (second - late)
            for late, second in zip(hidden_s, self.seconds, strict=True)
        )
        return replace(self, seconds=tuple(accumulate(seconds, max)))  # whatever was rounded


@dataclass(frozen=True)
class Network:
    """What each kind of op costs on the group at hand.

    Args:
        costs: by kind of op, see ``plan.METHODS``; those of ``all_reduce`` at least.

    Raises:
        ValueError: there are none of it.
    """

    costs: Mapping[str, Cost]

    def __post_init__(self) -> None:
        if "all_reduce" not in self.costs:
            raise ValueError("a network needs the cost of all_reduce, what else there may be")

    def op(self, kind: str) -> Cost:
        """What one kind of op takes.

        Raises:
            ValueError: that is not known.
        """
        if kind not in self.costs:
            raise ValueError(f"no cost is known for op {kind!r}, only for {', '.join(self.costs)}")
        return self.costs[kind]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that can be planned with: all of their ops have known costs."""
        return tuple(m for m, kinds in METHODS.items() if all(k in self.costs for k in kinds))

    def cost_s(self, method: str, size_bytes: float) -> float:
        """Seconds that a bucket takes on an idle network, with all ops of its method.

        Raises:
            ValueError: that is not known.
        """
        return sum(self.op(kind).alone_s(size_bytes) for kind in METHODS.get(method, (method,)))

    def known(self, size_bytes: float, methods: Sequence[str]) -> list[str]:
        """Those of some methods whose cost for a bucket is known.

        Where some were measured with so many bytes, it is those: others were given up.
        """
        reach = {m: min(self.op(k).sizes_bytes[-1] for k in METHODS[m]) for m in methods}
        enough = min(size_bytes, max(reach.values()))
        return [method for method in methods if reach[method] >= enough]

    def best(self, size_bytes: float, methods: Sequence[str]) -> str:
        """The cheapest of some methods for a bucket, of which it is ``known``; or the first."""
        known = self.known(size_bytes, methods)
        return min(known, key=lambda method: self.cost_s(method, size_bytes))

    @property
    def s_per_byte(self) -> float:
        """The least that one more byte costs, by whatever method."""
        return min(sum(self.op(kind).s_per_byte for kind in METHODS[m]) for m in self.methods)

    @property
    def latency_s(self) -> float:
        """The least time before anything transfers, by whatever method."""
        return min(self.op(METHODS[method][0]).latency_s for method in self.methods)

    def slowed(self, factor: float) -> Network:
        """The same network with transfers that take so many times as long."""
        return Network({kind: cost.slowed(factor) for kind, cost in self.costs.items()})

    @classmethod
    def linear(cls, latency_s: float, bytes_per_s: float) -> Network:
        """One of which only all-reduces are known, see ``Cost.linear``."""
        return cls({"all_reduce": Cost.linear(latency_s, bytes_per_s)})

    @classmethod
    def ideal(cls, ranks: int, link_bps: float, latency_s: float = 0.0) -> Network:
        """Links that do nothing else, each carrying what the method must send, in full duplex.

        Args:
            ranks: how many.
            link_bps: *bits* per second of each link, per direction.
            latency_s: of one message, seconds.
        """
        if ranks < 1 or not link_bps > 0:
            raise ValueError(f"{ranks} ranks on links of {link_bps} bit/s: both must be above zero")
        others = ranks - 1
        # Per kind, the messages that follow each other and how often a link carries the bucket.
        ring, direct = (others, others / ranks), (min(1, others), others / ranks)
        kinds = {
            "all_reduce": (2 * others, 2 * others / ranks),
            "all_gather": (others, others),
            "exchange": (min(1, others), others),
            "reduce_scatter": direct,
            "split": (2 * min(1, others), 2 * others / ranks),
            "ring_reduce_scatter": ring,
            "all_gather_parameters": ring,
        }
        return cls(
            {
                kind: Cost.linear(
                    messages * latency_s, link_bps / (8 * times) if times else MAX_BYTES_PER_S
                )
                for kind, (messages, times) in kinds.items()
            }
        )

    def to_json(self) -> dict[str, Any]:
        return {kind: asdict(cost) for kind, cost in self.costs.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Network:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: a field is missing or unknown, or no cost.
        """
        try:
            return cls(
                {
                    kind: Cost(
                        **{
                            **cost,
                            "sizes_bytes": tuple(cost["sizes_bytes"]),
                            "seconds": tuple(cost["seconds"]),
                            "hidden_s": tuple(cost.get("hidden_s", ())),
                        }
                    )
                    for kind, cost in data.items()
                }
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no network: {error}") from None
