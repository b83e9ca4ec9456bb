"""What a plan is made of while it is searched for: pieces on a grid of cut points, and their ops.

A search tries tens of thousands of plans that differ in little. So pieces are made once, in
numbers, and orders of their ops are timed without a ``Plan``.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from soonest.core.cost import Network
from soonest.core.plan import GATHER_PARAMETERS, METHODS, Bucket, Flat, Op, Plan, shards
from soonest.core.planner.bucketing import cut_points, layers_between
from soonest.core.planner.pieces import Piece, Send
from soonest.core.planner.unrolled import UnrolledTimer
from soonest.core.trace import Trace


class Space:
    """All pieces that a plan may be made of.

    Args:
        trace: the model.
        flats: its flat buffers.
        network: what each op costs.
        ranks: how many.
        methods: that pieces may have; either all of them shard or none.
        slice_bytes: see ``cut_points``.

    Attributes:
        trace, flats, network, ranks, methods: as given.
        points: per flat buffer, where it may be cut.
        sharded: whether the methods shard.
        timer: how long a step takes under orders of its pieces, and how much work that was.

    Raises:
        ValueError: a flat buffer holds a layer that the trace does not have.
    """

    def __init__(
        self,
        trace: Trace,
        flats: Sequence[Flat],
        network: Network,
        *,
        ranks: int,
        methods: Sequence[str],
        slice_bytes: float,
    ) -> None:
        index = {layer.name: i for i, layer in enumerate(trace.layers)}
        try:
            self._owners = [[index[slot.layer] for slot in flat.slots] for flat in flats]
        except KeyError as missing:
            raise ValueError(
                f"the plan sends layer {missing}, but trace {trace.model!r} has no such layer"
            ) from None
        self.trace, self.flats, self.network = trace, flats, network
        self.ranks, self.methods = ranks, methods
        self.points = [cut_points(flat, slice_bytes) for flat in flats]
        self.sharded = any(shards(method) for method in methods)
        chained = any(len(METHODS[method]) > 1 for method in methods)
        self.timer = UnrolledTimer(trace, ranks=ranks, sharded=self.sharded, chained=chained)
        self._pieces: dict[tuple[int, int, int, str], Piece] = {}
        self._every: dict[tuple[int, int, int], list[Piece]] = {}
        self._cheapest: dict[tuple[int, int, int], Piece] = {}

    def size_bytes(self, flat: int, first: int, last: int) -> int:
        """Size of the piece between two cut points, whose indices are given."""
        points = self.points[flat]
        return (points[last] - points[first]) * self.flats[flat].itemsize

    def every(self, flat: int, first: int, last: int) -> list[Piece]:
        """The pieces between two cut points, by all methods that can be used there."""
        key = (flat, first, last)
        if key not in self._every:
            known = self.network.known(self.size_bytes(*key), self.methods)
            self._every[key] = [self.piece(*key, method) for method in known]
        return self._every[key]

    def cheapest(self, flat: int, first: int, last: int) -> Piece:
        """The piece between two cut points by the method that is cheapest on an idle network."""
        key = (flat, first, last)
        if key not in self._cheapest:
            method = self.network.best(self.size_bytes(*key), self.methods)
            self._cheapest[key] = self.piece(*key, method)
        return self._cheapest[key]

    def leanest(self, flat: int, first: int, last: int) -> Piece:
        """The piece between two cut points by the method that transfers for the shortest time."""
        every = self.every(flat, first, last)
        return min(every, key=lambda piece: sum(send.transfer_s for send in piece.sends))

    def piece(self, flat: int, first: int, last: int, method: str) -> Piece:
        """The piece between two cut points by a method; always the same object."""
        key = (flat, first, last, method)
        if key not in self._pieces:
            self._pieces[key] = self._make(*key)
        return self._pieces[key]

    def _make(self, flat: int, first: int, last: int, method: str) -> Piece:
        size, slots = self.size_bytes(flat, first, last), self.flats[flat].slots
        start, stop = self.points[flat][first], self.points[flat][last]
        begin = bisect_right(slots, start, key=lambda slot: slot.start) - 1
        end = bisect_left(slots, stop, key=lambda slot: slot.start)
        layers = list(dict.fromkeys(self._owners[flat][begin:end]))
        ready_s, tail_s = self.timer.ready_s(layers), self.timer.tail_s(layers)
        need = (min(layers), flat, first)
        part_s = self.timer.part_s(size)
        piece = Piece(flat, first, last, method, ready_s, part_s, layers, need)
        kinds = METHODS[method]
        for stage, kind in enumerate(kinds):
            cost, gathers = self.network.op(kind), kind == GATHER_PARAMETERS
            late_s = tail_s if stage == len(kinds) - 1 else -math.inf
            transfer_s = cost.transfer_s(size)
            piece.sends.append(
                Send(ready_s, cost.latency_at(size), transfer_s, late_s, stage, gathers, piece)
            )
        return piece

    @staticmethod
    def pieces_of(order: Iterable[Send]) -> list[Piece]:
        """The pieces that some ops are of, in the order of buckets."""
        return sorted({send.piece for send in order}, key=lambda piece: (piece.flat, piece.first))

    def plan(self, order: Sequence[Send], window: int) -> Plan:
        """The plan that some order of ops stands for."""
        pieces = self.pieces_of(order)
        index = {piece: i for i, piece in enumerate(pieces)}
        ops = [Op(index[send.piece], METHODS[send.piece.method][send.stage]) for send in order]
        buckets = tuple(map(self._bucket, pieces))
        return Plan(self.ranks, tuple(self.flats), buckets, tuple(ops), window)

    def _bucket(self, piece: Piece) -> Bucket:
        points = self.points[piece.flat]
        start, stop = points[piece.first], points[piece.last]
        layers = layers_between(self.flats[piece.flat], start, stop)
        return Bucket(piece.flat, start, stop, piece.method, layers)
