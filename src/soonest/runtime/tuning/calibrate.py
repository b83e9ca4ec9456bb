"""Measures what each op costs at each size on the group at hand, and remembers it."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from soonest.core.cost import Cost, Network
from soonest.core.plan import METHODS
from soonest.runtime import comm
from soonest.runtime.comm import EXACT, Ranks, Wire, groups
from soonest.runtime.tuning.cache import keep, place_of, recall
from soonest.runtime.tuning.op_times import Stream, piece_of, stream_of, times_of, warm_up

BUDGET_S = 1.8
"""About how long a calibration may take, s."""
SIZES = tuple(1024 * 4**power for power in range(9))
"""Bytes of a bucket, 1 kB to 64 MB."""
_TIMES = 3
"""Times that each op is run at each size; where that takes long, once."""
_DROPPED = 1.5
_DROPPED_FROM = 64 << 10
"""A method that costs this many times as much as the cheapest, and ever more the larger the size,
is not measured any further; from this many bytes on."""
_STREAM = 6
"""Ops per stream: they follow each other, with two in flight."""
_STREAM_FRACTION = 1 / 20
"""Fraction of the budget for which all-reduces follow each other at each size. That long, a burst
that a network lets pass at first is used up. Of other methods what small ones show holds."""
_STREAM_BYTES = 256 << 10
"""Largest size, bytes, at which streams are measured. What a larger op leaves of the links unused,
others make up only if they are as large and come right behind."""
_HURRIED = 3
"""Sizes to leave out where even the smallest takes too long."""
_FORMAT = 2
_CHECKED = (1, 4)
"""Indices of the sizes at which a remembered calibration is compared with today's network."""
_ALIKE = 2.0
"""Largest factor between the two for the remembered one to hold."""

Watch = Callable[[int], None]


def network_of(
    ranks: Ranks, *, methods: Sequence[str], device: torch.device, wire: Wire
) -> Network:
    """What reducing costs on these ranks: remembered, or else measured; a collective call.

    Args:
        ranks: over which gradients are reduced.
        methods: whose costs are needed.
        device: of the buckets.
        wire: how they are sent.

    Returns:
        The first rank's fit, on every rank.
    """
    file = place_of("network", _key(ranks, methods, device, wire))
    known = _known(file, methods) if file and ranks.group.rank() == 0 else None
    known = comm.first_rank_object(ranks.group, known)
    if known is not None:
        network = Network.from_json(known)
        if _still_holds(network, ranks, device, wire):
            return network
    network = measure(ranks, methods=methods, device=device, wire=wire)
    if file and ranks.group.rank() == 0:
        keep(file, network.to_json())
    return network


def measure(
    ranks: Ranks,
    *,
    methods: Sequence[str],
    device: torch.device,
    wire: Wire = EXACT,
    budget_s: float = BUDGET_S,
    sizes: Sequence[int] = SIZES,
    watch: Watch = lambda size: None,
) -> Network:
    """Times the ops of some methods at growing sizes; a collective call.

    It ends when the time is used up. Costs beyond the last one are extrapolated, and where a
    method is far too dear it is not measured any further.

    Args:
        ranks, methods, device, wire: see ``network_of``.
        budget_s: about so long may it take, seconds; the smallest size is always measured, and a
            larger one with all-reduce.
        sizes: of buckets, bytes, ascending.
        watch: told of each size that is measured.

    Returns:
        The first rank's fit, on every rank.
    """
    if device.type != "cpu":
        warm_up(ranks, methods, piece_of(sizes[0], device, wire))
    end_s = time.perf_counter() + budget_s
    samples: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    streams: defaultdict[str, dict[int, Stream]] = defaultdict(dict)
    before: dict[str, float] = {}
    row = _Row(sizes[0], tuple(dict.fromkeys(("allreduce", *methods))))
    while (size := row.size) is not None:
        watch(size)
        kinds = list(dict.fromkeys(kind for method in row.live for kind in METHODS[method]))
        piece = piece_of(size, device, wire)
        if size == sizes[0]:  # buffers and connections are made now
            warm_s = sum(times_of(kind, ranks, piece, 1)[0] for kind in kinds)
            enough = (_TIMES + _STREAM) * warm_s < budget_s / 2
            times = comm.first_rank_object(ranks.group, _TIMES if enough else 1)
            row = row._replace(times=times)
            if times > 1:
                for kind in kinds:
                    streams[kind][size] = stream_of(kind, ranks, piece, _STREAM)
        elif row.stream and streams:
            streams["all_reduce"][size] = stream_of("all_reduce", ranks, piece, row.stream)
        found = {kind: times_of(kind, ranks, piece, row.times) for kind in kinds}
        for kind, took in found.items():
            samples[kind] += [(size, seconds) for seconds in took]
        op_s = {kind: median(took) for kind, took in found.items()}
        dearer = _dearer(row.live, op_s)
        live = tuple(
            m for m in row.live if _worthwhile(m, size, dearer[m], before.get(m, math.inf))
        )
        before = dearer
        left_s = end_s - time.perf_counter()
        mine = _next(sizes, size, live, op_s, left_s, stream_s=_STREAM_FRACTION * budget_s)
        row = comm.first_rank_object(ranks.group, mine)
    costs = {kind: _cost(took, streams[kind]) for kind, took in samples.items()}
    fit = comm.first_rank_object(ranks.group, Network(costs).to_json())
    return Network.from_json(fit)


class _Row(NamedTuple):
    """What to measure at one size.

    Args:
        size: of buckets, bytes; None ends it.
        live: methods that are still measured.
        times: how often each op is run.
        stream: how many all-reduces follow each other.
    """

    size: int | None
    live: tuple[str, ...]
    times: int = 1
    stream: int = 0


def _next(
    sizes: Sequence[int],
    size: int,
    live: tuple[str, ...],
    op_s: Mapping[str, float],
    left_s: float,
    *,
    stream_s: float,
) -> _Row:
    """Chooses what to measure next.

    Args:
        sizes: all.
        size: measured last.
        live: methods to go on with.
        op_s: what one op of each kind took, seconds.
        left_s: of the time for all, seconds.
        stream_s: about so long should all-reduces follow each other, seconds.
    """
    larger = [other for other in sizes if other > size]
    if not larger:
        return _Row(None, live)
    growth = larger[0] / size
    row_s, one_s = growth * sum(op_s.values()), growth * op_s["all_reduce"]
    ops = max(_STREAM, math.ceil(stream_s / one_s)) if larger[0] <= _STREAM_BYTES else 0
    if row_s + ops * one_s <= left_s:
        kept = 1.0 if len(larger) == 1 else 0.5  # with more sizes to come
        times = _TIMES if _TIMES * row_s + ops * one_s < kept * left_s else 1
        return _Row(larger[0], live, times, ops)
    # Large all-reduces show the bandwidth.
    if one_s <= left_s:
        return _Row(larger[0], ("allreduce",), stream=ops if (1 + ops) * one_s <= left_s else 0)
    hurried = larger[min(_HURRIED, len(larger) - 1)]  # even so there must be one
    return _Row(hurried if size == sizes[0] else None, ("allreduce",))


def _worthwhile(method: str, size: int, dearer: float, before: float) -> bool:
    """Whether to measure a method with more bytes, too."""
    return method == "allreduce" or size < _DROPPED_FROM or dearer < max(_DROPPED, before)


def _dearer(methods: Sequence[str], op_s: Mapping[str, float]) -> dict[str, float]:
    """How many times as much each method costs as the cheapest."""
    cost_s = {method: sum(op_s[kind] for kind in METHODS[method]) for method in methods}
    least_s = min(cost_s.values())
    return {method: cost / least_s for method, cost in cost_s.items()}


def _cost(took: Sequence[tuple[int, float]], streams: Mapping[int, Stream]) -> Cost:
    """What an op costs, from single ones and from streams.

    Of a stream only the whole tells something: ops in flight share the links, so that the first one
    ends late, and the last one soon behind it.
    """
    spaced_s: dict[float, float] = {}
    for size, stream in streams.items():
        alone_s = median(seconds for other, seconds in took if other == size)
        spaced_s[size] = max(0.0, stream.seconds - alone_s) / (stream.ops - 1)
    return Cost.fit(took, spaced_s=spaced_s)


# Remembering


def _still_holds(network: Network, ranks: Ranks, device: torch.device, wire: Wire) -> bool:
    """Whether the network is about as fast as it was; a collective call."""
    fits = True
    for size in (SIZES[index] for index in _CHECKED):
        took = median(times_of("all_reduce", ranks, piece_of(size, device, wire), 3))
        known = network.op("all_reduce").alone_s(size)
        fits = fits and known / _ALIKE <= took <= known * _ALIKE
    return comm.first_rank_object(ranks.group, fits)


def _key(ranks: Ranks, methods: Sequence[str], device: torch.device, wire: Wire) -> dict[str, Any]:
    """All that a calibration depends on, as JSON."""
    hosts = comm.gather_objects(ranks.group, groups.host_name())
    return {
        "format": _FORMAT,
        "hosts": hosts,
        "backend": dist.get_backend(ranks.group),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME", ""),
        "ops": {method: METHODS[method] for method in methods},
        "device": device.type,
        "wire": [str(wire.gradients), str(wire.parameters)],
        "torch": torch.__version__,
    }


def _known(file: Path, methods: Sequence[str]) -> dict[str, Any] | None:
    """The calibration in a file; None if it is not whole."""
    data = recall(file)
    try:
        network = Network.from_json(data)
        for method in methods:
            network.cost_s(method, SIZES[0])
    except ValueError:
        return None
    return data
