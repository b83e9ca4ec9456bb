"""The simple plans from which a search begins: several bucketings, each in dispatched order."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from soonest.core.plan import Bucket
from soonest.core.planner.bucketing import PARTS, make_buckets
from soonest.core.planner.ddp_buckets import filled
from soonest.core.planner.dispatch import Chain, dispatch
from soonest.core.planner.pieces import Piece, Send
from soonest.core.planner.search_space import Space

_COARSENESS = (1.0, 0.25, 0.5, 2.0, 4.0, 8.0, PARTS, math.inf)
_FILLED_BYTES = 25e6
"""Size of one start's buckets, about as large as DDP's; the search moves on from there, and what
it then finds depends on the very number, so it is not DDP's own."""
_MOST_PIECES = 64
"""Above so many pieces a bucket for every piece is not tried: it would cost more than it shows."""


def simple_orders(space: Space) -> list[list[Send]]:
    """Orders for different bucketings, each with the cheapest methods and with the leanest ones."""
    orders: dict[tuple[Piece, ...], list[Send]] = {}
    for bucketing in _bucketings(space):
        for choose in (space.cheapest, space.leanest):
            pieces = [choose(i, a, b) for i, at in enumerate(bucketing) for a, b in pairwise(at)]
            if tuple(pieces) not in orders:
                orders[tuple(pieces)] = dispatched(space, pieces)
    return list(orders.values())


def _bucketings(space: Space) -> Iterator[list[list[int]]]:
    """Per flat buffer, the indices of the cut points that are used."""
    for coarseness in _COARSENESS:
        buckets = make_buckets(
            space.flats,
            space.network,
            ranks=space.ranks,
            methods=space.methods,
            coarseness=coarseness,
        )
        yield [_snapped(points, i, buckets) for i, points in enumerate(space.points)]
    yield [_filled(space, i) for i in range(len(space.flats))]
    layers = [_layer_borders(space, i) for i in range(len(space.flats))]
    for bucketing in (layers, [list(range(len(points))) for points in space.points]):
        if sum(map(len, bucketing)) <= _MOST_PIECES:
            yield bucketing


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
    """Indices of the cut points at which one layer ends and the next begins."""
    slots = space.flats[flat].slots
    starts = {b.start for a, b in pairwise(slots) if a.layer != b.layer}
    points = space.points[flat]
    return [i for i, at in enumerate(points) if at in starts or i in (0, len(points) - 1)]


def dispatched(space: Space, pieces: Sequence[Piece]) -> list[Send]:
    """The ops of all pieces as ``dispatch`` puts them in order, latencies taken as hidden."""
    space.timer.work += 2 * len(pieces)
    chains = [
        Chain(
            piece.ready_s,
            piece.sends[-1].tail_s,
            piece.part_s,
            [(0.0, send.transfer_s, send.gathers) for send in piece.sends],
        )
        for piece in pieces
    ]
    order = dispatch(chains, backward_s=space.timer.backward_s)
    return [pieces[number].sends[stage] for number, stage in order]
