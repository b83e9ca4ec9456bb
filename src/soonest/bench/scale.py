"""How much slower and smaller than real a comparison must be for this machine to carry it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from soonest.bench.settings import payload_network
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.trace import Trace

_STEP_S = 1.2
"""A step must take so long that the errors of sleeping do not matter."""
_OPS = 130
"""A step must take as long as so many small all-reduces, or nothing but their latency shows."""
_LAYERS_SHARE = 0.015
"""Of a step, what torch may take around the sleeps."""
_BYTES_SHARE = 0.1
"""Of what the cores can do, what may go into moving bytes."""
_LEAST_BYTES = 4 << 20
"""A smaller model would be more padding and headers than parameters."""


@dataclass(frozen=True)
class Capacity:
    """What this machine can carry while all ranks are busy.

    Args:
        layer_s: of CPU per layer, forward and backward pass and update.
        op_s: of a small all-reduce.
        bytes_per_s: of large all-reduces that no link holds up.
    """

    layer_s: float
    op_s: float
    bytes_per_s: float


def choose(
    trace: Trace,
    hosts: int,
    link_bps: float,
    capacity: Capacity,
    *,
    slow_motion: float | None = None,
    shrink: float | None = None,
) -> tuple[float, float]:
    """Slow motion and shrink that this machine can carry; one that is given is kept.

    Args:
        trace: to be replayed.
        hosts: how many.
        link_bps: of the cluster that is emulated.
        capacity: as measured with so many hosts.
        slow_motion, shrink: if given.
    """
    network = payload_network(hosts, link_bps)
    step_s = lower_bound_s(trace, network)
    sending_s = network.cost_s("allreduce", trace.total_bytes)
    if slow_motion is None:
        least_s = max(
            _STEP_S,
            _OPS * capacity.op_s,
            len(trace.layers) * capacity.layer_s / _LAYERS_SHARE,
        )
        size = trace.total_bytes / shrink if shrink else min(trace.total_bytes, _LEAST_BYTES)
        moving_s = size / capacity.bytes_per_s / _BYTES_SHARE
        slow_motion = _round_up(max(least_s / step_s, moving_s / sending_s))
    if shrink is None:
        can_bytes = _BYTES_SHARE * capacity.bytes_per_s * slow_motion * sending_s
        shrink = 2.0 ** max(0, math.ceil(math.log2(trace.total_bytes / can_bytes)))
    return slow_motion, shrink


def _round_up(value: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit - 1e-9) * unit, 9)
