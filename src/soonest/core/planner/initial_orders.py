"""Simple plans, from which a search begins."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from soonest.core.plan import Bucket
from soonest.core.planner.bucketing import PARTS, cut
from soonest.core.planner.ddp_buckets import filled
from soonest.core.planner.search_space import Piece, Send, Space

_COARSENESS = (1.0, 0.25, 0.5, 2.0, 4.0, 8.0, PARTS, math.inf)
_FILLED_BYTES = 25e6
"""Size of the buckets that ``DistributedDataParallel`` fills from the back."""
_MOST_PIECES = 64
"""Above so many pieces a cut at every border is not tried: it would cost more than it shows."""


def simple_orders(space: Space) -> list[list[Send]]:
    """Orders for different cuts, each with the cheapest methods and with the leanest ones."""
    orders: dict[tuple[Piece, ...], list[Send]] = {}
    for cuts in _cuts(space):
        for choose in (space.cheapest, space.leanest):
            pieces = [choose(i, a, b) for i, at in enumerate(cuts) for a, b in pairwise(at)]
            if tuple(pieces) not in orders:
                orders[tuple(pieces)] = dispatched(space, pieces)
    return list(orders.values())


def _cuts(space: Space) -> Iterator[list[list[int]]]:
    """Per flat buffer, the indices of the cut points that are used."""
    for coarseness in _COARSENESS:
        buckets = cut(
            space.flats,
            space.network,
            ranks=space.ranks,
            methods=space.methods,
            coarseness=coarseness,
        )
        yield [_snapped(points, i, buckets) for i, points in enumerate(space.points)]
    yield [_filled(space, i) for i in range(len(space.flats))]
    layers = [_layer_borders(space, i) for i in range(len(space.flats))]
    for cuts in (layers, [list(range(len(points))) for points in space.points]):
        if sum(map(len, cuts)) <= _MOST_PIECES:
            yield cuts


def _snapped(points: Sequence[int], flat: int, buckets: Sequence[Bucket]) -> list[int]:
    """The nearest cut points to the ends of some buckets."""
    found = {0, len(points) - 1}
    for bucket in buckets:
        if bucket.flat == flat:
            right = bisect_left(points, bucket.stop)
            near = [i for i in (right - 1, right) if 0 <= i < len(points)]
            found.add(min(near, key=lambda i: abs(points[i] - bucket.stop)))
    return sorted(found)


def _filled(space: Space, flat: int) -> list[int]:
    """Buckets that are closed as soon as they hold enough, from the back to the front."""
    last = len(space.points[flat]) - 1
    sizes = [space.size_bytes(flat, i, i + 1) for i in reversed(range(last))]
    ends = accumulate(filled(sizes, [_FILLED_BYTES]), initial=0)
    return [last - end for end in ends][::-1]


def _layer_borders(space: Space, flat: int) -> list[int]:
    slots = space.flats[flat].slots
    starts = {b.start for a, b in pairwise(slots) if a.layer != b.layer}
    points = space.points[flat]
    return [i for i, at in enumerate(points) if at in starts or i in (0, len(points) - 1)]


def dispatched(space: Space, pieces: Sequence[Piece]) -> list[Send]:
    """The ops of all pieces: whenever the network gets free, the longest tail goes first.

    That is Schrage's heuristic (J. Carlier, "The one-machine sequencing problem", European
    Journal of Operational Research 11, 1982), latencies taken as hidden.
    """
    space.work += 2 * len(pieces)
    coming = sorted((piece.ready_s, number) for number, piece in enumerate(pieces))
    coming.reverse()
    later: list[tuple[float, int, Send]] = []
    waiting: list[tuple[float, int, Send]] = []
    sharing: list[tuple[float, int, Send]] = []
    order: list[Send] = []
    now = 0.0
    while coming or waiting or later or sharing:
        if not (coming or waiting or later):
            later, sharing = sharing, later
        if not waiting:
            first = min(coming[-1][0] if coming else math.inf, later[0][0] if later else math.inf)
            now = max(now, first)
        while coming and coming[-1][0] <= now:
            number = coming.pop()[1]
            send = pieces[number].sends[0]
            heapq.heappush(waiting, (-pieces[number].sends[-1].tail_s, number, send))
        while later and later[0][0] <= now:
            _, number, send = heapq.heappop(later)
            heapq.heappush(waiting, (-pieces[number].sends[-1].tail_s, number, send))
        _, number, send = heapq.heappop(waiting)
        order.append(send)
        now += send.transfer_s
        sends = send.piece.sends
        if send.stage + 1 < len(sends):
            after = sends[send.stage + 1]
            if after.shares:
                ready_s = max(now, space.backward_s) + send.piece.part_s
                heapq.heappush(sharing, (ready_s, number, after))
            else:
                heapq.heappush(later, (now, number, after))
    return order
