"""Simple plans, from which a search begins."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

from soonest.core.cuts import PARTS, cut
from soonest.core.pieces import Piece, Send, Space
from soonest.core.plan import Bucket

_COARSENESS = (1.0, 0.5, 2.0, 4.0, 8.0, PARTS, math.inf)
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
                orders[tuple(pieces)] = space.dispatched(pieces)
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
    found = [len(space.points[flat]) - 1]
    for i in range(found[0] - 1, -1, -1):
        if i == 0 or space.size_bytes(flat, i, found[-1]) >= _FILLED_BYTES:
            found.append(i)
    return found[::-1]


def _layer_borders(space: Space, flat: int) -> list[int]:
    slots = space.flats[flat].slots
    starts = {b.start for a, b in pairwise(slots) if a.layer != b.layer}
    points = space.points[flat]
    return [i for i, at in enumerate(points) if at in starts or i in (0, len(points) - 1)]
