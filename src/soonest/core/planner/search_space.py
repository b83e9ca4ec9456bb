"""What a plan is made of while it is searched for: pieces on a grid of cut points, and their ops.

A search tries tens of thousands of plans that differ in little. So pieces are made once, in
numbers, and an order of their ops is timed without a ``Plan``. ``simulate`` takes as long for it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from soonest.core.cost import Network
from soonest.core.plan import METHODS, SHARED_PARAMETERS, Bucket, Flat, Op, Plan, shards
from soonest.core.planner.bucketing import cut_points, layers_between
from soonest.core.simulator.lane import one_by_one
from soonest.core.trace import Trace

_EACH = 15
"""What timing an order costs besides, as in ops."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A bucket, in numbers.

    Args:
        flat: index of its flat buffer.
        first, last: indices of the cut points where it starts and stops.
        method: how it is combined.
        ready_s: when the gradients of all layers that it carries are ready.
        part_s: how long a rank takes to update its part, where it is sharded.
        layers: indices of the layers that it carries.
        need: sorts pieces by the first layer that needs them.
        sends: its ops.
    """

    flat: int
    first: int
    last: int
    method: str
    ready_s: float
    part_s: float
    layers: Sequence[int]
    need: tuple[int, int, int]
    sends: list[Send] = field(default_factory=list["Send"], repr=False)


class Send(NamedTuple):
    """One op of a piece.

    Args:
        ready_s: when it may be issued, if it is the first of its piece.
        latency_s: passes while others transfer.
        transfer_s: how long it keeps the network to itself.
        tail_s: what must still be computed once its piece has landed with it; minus infinity if it
            is not the last of its piece.
        stage: how many ops of its piece come before it.
        shares: whether it shares parameters, behind an update.
        piece: whose op this is.
    """

    ready_s: float
    latency_s: float
    transfer_s: float
    tail_s: float
    stage: int
    shares: bool
    piece: Piece


class Space:
    """All pieces that a plan may be made of.

    Args:
        trace: the model.
        flats: its flat buffers.
        network: what combining costs.
        ranks: how many.
        methods: that pieces may have; either all of them shard or none.
        slice_bytes: see ``cut_points``.

    Attributes:
        trace, flats, network, ranks, methods: as given.
        points: per flat buffer, where it may be cut.
        backward_s: how long the backward pass computes.
        compute_s: how long a step does.
        work: how many ops and layers were timed so far.

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
        self._many = any(len(METHODS[method]) > 1 for method in methods)
        self._ready_s = trace.ready_s()
        self.backward_s = self._ready_s[0]
        self.compute_s = self.backward_s + trace.forward_s
        self._forward_s = [layer.fwd_us * 1e-6 for layer in trace.layers]
        self._update_per_byte = trace.update_us * 1e-6 / max(1, trace.total_bytes)
        # A rank that updates but its parts does so before it shares them.
        whole = 0.0 if self.sharded else self._update_per_byte
        self._update_s = [layer.bytes * whole for layer in trace.layers]
        self._tail_s = [a + b for a, b in zip(trace.tail_s(), self._update_s, strict=True)]
        self._updates = any(self._update_s)
        self._pieces: dict[tuple[int, int, int, str], Piece] = {}
        self._every: dict[tuple[int, int, int], list[Piece]] = {}
        self._cheapest: dict[tuple[int, int, int], Piece] = {}
        self.work = 0

    def size_bytes(self, flat: int, first: int, last: int) -> int:
        """Of a piece between two cut points."""
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
        ready_s = max(self._ready_s[layer] for layer in layers)
        tail_s = max(self._tail_s[layer] for layer in layers)
        need = (min(layers), flat, first)
        part_s = size * self._update_per_byte / self.ranks
        piece = Piece(flat, first, last, method, ready_s, part_s, layers, need)
        kinds = METHODS[method]
        for stage, kind in enumerate(kinds):
            cost, shares = self.network.op(kind), kind == SHARED_PARAMETERS
            late_s = tail_s if stage == len(kinds) - 1 else -math.inf
            transfer_s = cost.transfer_s(size)
            piece.sends.append(
                Send(ready_s, cost.latency_at(size), transfer_s, late_s, stage, shares, piece)
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

    def step_s(self, order: Sequence[Send], window: int, limit_s: float = math.inf) -> float:
        """How long a step takes; as ``simulate.run`` says.

        Args:
            order: all ops of the pieces that cover the flat buffers.
            window: how many may be in flight.
            limit_s: once it is known that the step takes longer, any such time may be returned.
        """
        self.work += len(order) + _EACH
        many = self._many
        ends = [0.0] * window
        ended: dict[Piece, float] = {}
        shared_from: dict[Piece, float] | None = None
        end = issued = 0.0
        late = self.compute_s
        # The list grows meanwhile: its end of an op is read again ``window`` ops later.
        for slot_free, send in zip(ends, order):  # noqa: B905
            ready, latency, transfer, tail, stage, shares, piece = send
            if stage:
                if shares and shared_from is None:
                    shared_from = self._shared_from(ended)
                ready = (shared_from if shares and shared_from else ended)[piece]
            if ready > issued:
                issued = ready
            if slot_free > issued:
                issued = slot_free
            start = issued + latency
            end = (start if start > end else end) + transfer
            ends.append(end)
            if many:
                ended[piece] = end
            if end + tail > late:
                late = end + tail
                if late > limit_s:
                    return late
        return self._updated_s(order, ends[window:]) if self._updates else late

    def _updated_s(self, order: Sequence[Send], ends: Sequence[float]) -> float:
        """The same from the ends of all ops, layer by layer."""
        self.work += 2 * len(self._forward_s)
        landed: dict[int, float] = {}
        for send, end in zip(order, ends, strict=True):
            if send.tail_s >= 0:
                landed.update(dict.fromkeys(send.piece.layers, end))
        now = self.backward_s
        updates = one_by_one(sorted(landed), landed, self._update_s, now)
        for update, forward in zip(updates, self._forward_s, strict=True):
            now = (update[1] if update and update[1] > now else now) + forward
        return now

    def _shared_from(self, combined: Mapping[Piece, float]) -> dict[Piece, float]:
        """When the parts of all pieces are updated, from when their gradients are combined."""
        if not self._update_per_byte:
            return {piece: max(at, self.backward_s) for piece, at in combined.items()}
        self.work += len(combined)
        pieces = sorted(combined, key=lambda piece: piece.need)
        durations = [piece.part_s for piece in pieces]
        ready = [combined[piece] for piece in pieces]
        parts = one_by_one(range(len(pieces)), ready, durations, self.backward_s)
        return {piece: part[1] for piece, part in zip(pieces, parts, strict=True) if part}

    def critical(self, order: Sequence[Send], window: int) -> tuple[int, list[int]]:
        """What a step waits for, its updates aside.

        Returns:
            The position of the op that lands the latest for what depends on it; and the positions
            up to there before which the network idles, because something was not ready.
        """
        self.work += len(order)
        idle: list[int] = []
        ends = [0.0] * window
        ended: dict[Piece, float] = {}
        shared_from: dict[Piece, float] | None = None
        end = issued = 0.0
        late, position = -math.inf, 0
        for at, send in enumerate(order):
            ready = send.ready_s
            if send.shares:
                shared_from = shared_from or self._shared_from(ended)
                ready = shared_from[send.piece]
            elif send.stage:
                ready = ended[send.piece]
            issued = max(issued, ready, ends[at])
            if issued + send.latency_s > end:
                idle.append(at)
            end = ended[send.piece] = max(issued + send.latency_s, end) + send.transfer_s
            ends.append(end)
            if end + send.tail_s >= late:
                late, position = end + send.tail_s, at
        return position, [at for at in idle if at <= position]
