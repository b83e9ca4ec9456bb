"""The recurrences of ``simulator/lane.py`` once more, unrolled for a search that needs one number.

A search times tens of thousands of orders that differ in little. So what does not change from one
to the next is computed once, the loop over the ops allocates nothing but the list of their ends,
and it ends as soon as a limit is passed. ``tests/core/planner/test_best_plan.py`` holds it to what
the simulator says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from soonest.core.planner.pieces import Piece, Send
from soonest.core.simulator.lane import Lane, one_by_one
from soonest.core.trace import Trace

_EACH = 15
"""What timing an order costs besides, as in ops."""


class UnrolledTimer:
    """How long a step takes under orders of the ops of pieces.

    Args:
        trace: the model.
        ranks: how many.
        sharded: whether a rank updates only its part of a piece.
        chained: whether any piece has several ops.

    Attributes:
        backward_s: how long the backward pass computes.
        compute_s: how long a step does.
        work: how many ops and layers were timed so far.
    """

    def __init__(self, trace: Trace, *, ranks: int, sharded: bool, chained: bool) -> None:
        self._ranks = ranks
        self._chained = chained
        self._ready_s = trace.ready_s()
        self.backward_s = self._ready_s[0]
        self.compute_s = self.backward_s + trace.forward_s
        self._forward_s = [layer.fwd_us * 1e-6 for layer in trace.layers]
        self._update_per_byte = trace.update_us * 1e-6 / max(1, trace.total_bytes)
        # A rank that updates but its parts does so before it gathers them.
        whole = 0.0 if sharded else self._update_per_byte
        self._update_s = [layer.bytes * whole for layer in trace.layers]
        self._tail_s = [a + b for a, b in zip(trace.tail_s(), self._update_s, strict=True)]
        self._updates = any(self._update_s)
        self.work = 0

    def ready_s(self, layers: Sequence[int]) -> float:
        """When the gradients of all of some layers are ready."""
        return max(self._ready_s[layer] for layer in layers)

    def tail_s(self, layers: Sequence[int]) -> float:
        """What must still be computed once the gradients of some layers are reduced."""
        return max(self._tail_s[layer] for layer in layers)

    def part_s(self, size_bytes: int) -> float:
        """How long a rank updates its part of so many bytes."""
        return size_bytes * self._update_per_byte / self._ranks

    def step_s(self, order: Sequence[Send], window: int, limit_s: float = math.inf) -> float:
        """How long a step takes: ``Lane.send`` unrolled, with the layers' tails in the same loop.

        Args:
            order: all ops of the pieces that cover the flat buffers.
            window: how many may be in flight.
            limit_s: once it is known that the step takes longer, any such time may be returned.
        """
        self.work += len(order) + _EACH
        chained = self._chained
        ends = [0.0] * window
        ended: dict[Piece, float] = {}
        gather_from: dict[Piece, float] | None = None
        end = issued = 0.0
        late = self.compute_s
        # The list grows meanwhile: its end of an op is read again ``window`` ops later.
        for slot_free, send in zip(ends, order):  # noqa: B905
            ready, latency, transfer, tail, stage, gathers, piece = send
            if stage:
                if gathers and gather_from is None:
                    gather_from = self._gather_from(ended)
                ready = (gather_from if gathers and gather_from else ended)[piece]
            if ready > issued:
                issued = ready
            if slot_free > issued:
                issued = slot_free
            start = issued + latency
            end = (start if start > end else end) + transfer
            ends.append(end)
            if chained:
                ended[piece] = end
            if end + tail > late:
                late = end + tail
                if late > limit_s:
                    return late
        return self._updated_s(order, ends[window:]) if self._updates else late

    def _updated_s(self, order: Sequence[Send], ends: Sequence[float]) -> float:
        """The same from the ends of all ops, layer by layer."""
        self.work += 2 * len(self._forward_s)
        available: dict[int, float] = {}
        for send, end in zip(order, ends, strict=True):
            if send.tail_s >= 0:
                available.update(dict.fromkeys(send.piece.layers, end))
        now = self.backward_s
        updates = one_by_one(sorted(available), available, self._update_s, now)
        for update, forward in zip(updates, self._forward_s, strict=True):
            now = (update[1] if update and update[1] > now else now) + forward
        return now

    def _gather_from(self, reduced: Mapping[Piece, float]) -> dict[Piece, float]:
        """When the parts of all pieces are updated, from when their gradients are reduced."""
        if not self._update_per_byte:
            return {piece: max(at, self.backward_s) for piece, at in reduced.items()}
        self.work += len(reduced)
        pieces = sorted(reduced, key=lambda piece: piece.need)
        durations = [piece.part_s for piece in pieces]
        ready = [reduced[piece] for piece in pieces]
        parts = one_by_one(range(len(pieces)), ready, durations, self.backward_s)
        return {piece: part[1] for piece, part in zip(pieces, parts, strict=True) if part}

    def critical(self, order: Sequence[Send], window: int) -> tuple[int, list[int]]:
        """What a step waits for, its updates aside.

        Returns:
            The position of the op that ends the latest for what depends on it; and the positions up
            to there before which the network idles, because something was not ready.
        """
        self.work += len(order)
        lane = Lane(window)
        reducing = [send for send in order if not send.gathers]
        at = {send.piece: send.ready_s for send in reducing}
        lane.send(map(_op, reducing), at)
        if len(reducing) < len(order):
            at = self._gather_from(at)
            lane.send(map(_op, order[len(reducing) :]), at)
        late, position = -math.inf, 0
        idle: list[int] = []
        before = 0.0
        for place, (send, (start, end)) in enumerate(zip(order, lane.transfers, strict=True)):
            if start > before:
                idle.append(place)
            if end + send.tail_s >= late:
                late, position = end + send.tail_s, place
            before = end
        return position, [place for place in idle if place <= position]


def _op(send: Send) -> tuple[Piece, float, float, bool]:
    return send.piece, send.latency_s, send.transfer_s, False
