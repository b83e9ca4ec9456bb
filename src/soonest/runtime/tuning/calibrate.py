"""Measures what each method costs on the group at hand, and remembers it."""

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
from soonest.runtime.comm import EXACT, Piece, Ranks, Running, Wire, groups
from soonest.runtime.tuning.cache import keep, place_of, recall

BUDGET_S = 1.8
SIZES = tuple(1024 * 4**power for power in range(9))
"""Bytes of a bucket, 1 kB to 64 MB."""
_TIMES = 3
"""Of each op and size; where that takes long, once."""
_DROPPED = 1.5
_DROPPED_FROM = 64 << 10
"""From so many bytes on, a method that costs so many times as much as the cheapest, and ever more,
is not measured with still more."""
_STREAM = 6
"""Ops that follow each other, with two in flight."""
_STREAM_SHARE = 1 / 20
"""Of the time for all, what all-reduces that follow each other take at each size: as long as that,
what lets the first ones pass faster is used up. Of other methods what small ones show holds."""
_STREAM_BYTES = 256 << 10
"""Larger ones do not follow each other here. What one of them leaves unused, others make up only if
they are as large and come right behind."""
_HURRIED = 3
"""Where even the smallest size takes too long, so many sizes are left out."""
_FORMAT = 2
_CHECKED = (1, 4)
"""Sizes, by index, at which a remembered calibration is compared with the network of today."""
_ALIKE = 2.0
"""It holds as long as they differ by no more than this factor."""

Watch = Callable[[int], None]


def network_of(
    ranks: Ranks, *, methods: Sequence[str], device: torch.device, wire: Wire
) -> Network:
    """What combining costs on these ranks: remembered, or else measured; a collective call.

    Args:
        ranks: who combines.
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
    """Times the ops of some methods at several sizes; a collective call.

    Sizes grow until the time is used up. Costs beyond the last one are extrapolated, and where a
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
        _warm_up(ranks, methods, _piece(sizes[0], device, wire))
    end_s = time.perf_counter() + budget_s
    samples: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    streams: defaultdict[str, dict[int, _Stream]] = defaultdict(dict)
    before: dict[str, float] = {}
    row = _Row(sizes[0], tuple(dict.fromkeys(("allreduce", *methods))))
    while (size := row.size) is not None:
        watch(size)
        kinds = list(dict.fromkeys(kind for method in row.live for kind in METHODS[method]))
        piece = _piece(size, device, wire)
        if size == sizes[0]:  # buffers and connections are made now
            warm_s = sum(_time(kind, ranks, piece, 1)[0] for kind in kinds)
            enough = (_TIMES + _STREAM) * warm_s < budget_s / 2
            times = comm.first_rank_object(ranks.group, _TIMES if enough else 1)
            row = row._replace(times=times)
            if times > 1:
                for kind in kinds:
                    streams[kind][size] = _stream(kind, ranks, piece, _STREAM)
        elif row.stream and streams:
            streams["all_reduce"][size] = _stream("all_reduce", ranks, piece, row.stream)
        found = {kind: _time(kind, ranks, piece, row.times) for kind in kinds}
        for kind, took in found.items():
            samples[kind] += [(size, seconds) for seconds in took]
        op_s = {kind: median(took) for kind, took in found.items()}
        dearer = _dearer(row.live, op_s)
        live = tuple(
            m for m in row.live if _worthwhile(m, size, dearer[m], before.get(m, math.inf))
        )
        before = dearer
        left_s = end_s - time.perf_counter()
        mine = _next(sizes, size, live, op_s, left_s, stream_s=_STREAM_SHARE * budget_s)
        row = comm.first_rank_object(ranks.group, mine)
    costs = {kind: _cost(took, streams[kind]) for kind, took in samples.items()}
    fit = comm.first_rank_object(ranks.group, Network(costs).to_json())
    return Network.from_json(fit)


class _Row(NamedTuple):
    """What to measure at one size.

    Args:
        size: of buckets, bytes; None ends it.
        live: methods.
        times: of each op.
        stream: all-reduces that then follow each other.
    """

    size: int | None
    live: tuple[str, ...]
    times: int = 1
    stream: int = 0


class _Stream(NamedTuple):
    """Ops that followed each other.

    Args:
        ops: how many.
        seconds: all of them together.
    """

    ops: int
    seconds: float


def _next(
    sizes: Sequence[int],
    size: int,
    live: tuple[str, ...],
    op_s: Mapping[str, float],
    left_s: float,
    *,
    stream_s: float,
) -> _Row:
    """What to measure next.

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


def _piece(size_bytes: int, device: torch.device, wire: Wire) -> Piece:
    buffer = torch.zeros(max(1, size_bytes // 4), device=device)
    return Piece(buffer, buffer.clone(), wire.of(buffer.element_size()))


def _warm_up(ranks: Ranks, methods: Sequence[str], piece: Piece) -> None:
    """Devices make communicators and load kernels when they first need them, which takes seconds
    that are no cost of an op."""
    for kind in dict.fromkeys(kind for m in ("allreduce", *methods) for kind in METHODS[m]):
        comm.run(kind, ranks, piece)
    _now_s(piece)


def _time(kind: str, ranks: Ranks, piece: Piece, times: int) -> list[float]:
    """Seconds of several ops, one after the other."""
    took: list[float] = []
    for _ in range(times):
        began_s = _now_s(piece)
        comm.run(kind, ranks, piece)
        took.append(_now_s(piece) - began_s)
    return took


def _stream(kind: str, ranks: Ranks, piece: Piece, ops: int) -> _Stream:
    """Ops that follow each other, with two in flight."""
    pieces = [piece, Piece(piece.gradients.clone(), piece.parameters.clone(), piece.wire)]
    began_s = _now_s(piece)
    flying = [comm.start(kind, ranks, pieces[0])]
    for number in range(1, ops):
        flying.append(comm.start(kind, ranks, pieces[number % 2]))
        _finish(flying.pop(0))
    _finish(flying.pop())
    return _Stream(ops, _now_s(piece) - began_s)


def _now_s(piece: Piece) -> float:
    """The time at which its device has done all that it was asked to; the host waits for that."""
    device = piece.gradients.device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _cost(took: Sequence[tuple[int, float]], streams: Mapping[int, _Stream]) -> Cost:
    """What an op costs, from single ones and from streams.

    Of a stream only the whole tells something: ops in flight share the links, so that the first one
    ends late, and the last one soon behind it.
    """
    spaced_s: dict[float, float] = {}
    for size, stream in streams.items():
        alone_s = median(seconds for other, seconds in took if other == size)
        spaced_s[size] = max(0.0, stream.seconds - alone_s) / (stream.ops - 1)
    return Cost.fit(took, spaced_s=spaced_s)


def _finish(running: Running) -> None:
    while running.work is not None:
        running.work.wait()
        running.go_on()


# What is remembered from one run to the next


def _still_holds(network: Network, ranks: Ranks, device: torch.device, wire: Wire) -> bool:
    """Whether the network is about as fast as it was."""
    fits = True
    for size in (SIZES[index] for index in _CHECKED):
        took = median(_time("all_reduce", ranks, _piece(size, device, wire), 3))
        known = network.op("all_reduce").alone_s(size)
        fits = fits and known / _ALIKE <= took <= known * _ALIKE
    return comm.first_rank_object(ranks.group, fits)


def _key(ranks: Ranks, methods: Sequence[str], device: torch.device, wire: Wire) -> dict[str, Any]:
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
    """What the file holds, if it is whole; otherwise it is measured anew."""
    data = recall(file)
    try:
        network = Network.from_json(data)
        for method in methods:
            network.cost_s(method, SIZES[0])
    except ValueError:
        return None
    return data
