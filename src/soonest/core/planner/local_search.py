"""Searches for the buckets, methods and order with the shortest simulated step, all together.

From several simple plans it goes downhill by small changes, then again and again from the best plan
so far after a few random ones (H. R. Lourenço, O. C. Martin, T. Stützle, "Iterated local search",
Handbook of Metaheuristics, 2003). It is deterministic, and counts its work instead of its time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence

from soonest.core.planner.descent import descend
from soonest.core.planner.pieces import Piece, Send
from soonest.core.planner.search_space import Space

_GAIN = 1e-5
"""A change must shorten the step by this fraction to be made, lest rounding decides."""
_NEAR = 1e-4
"""An order within this fraction of the lower bound ends the search."""
_DESCENTS = 3
"""How many of the simple plans, the best ones, are improved before random changes begin."""
_DESCENT_WORK = 0.2
"""Fraction of all work that each of these may take, so that enough is left for what follows."""
_FEW = 12
"""With at most this many ops every move of a single op is tried; with more, only useful ones."""
_KICKS = (1, 2, 3, 4)
"""How many random changes lead away from the best plan before the next descent: one of these."""
_ENOUGH = 150
"""The search ends after so many descents in a row that found nothing better."""

_OP = 2e-5
"""What each op is taken to cost besides, as a fraction of the step. The simulator does not know of
host overheads, so of two equally fast plans the one with fewer ops is the better."""

Order = list[Send]


def search(
    space: Space, starts: Sequence[Order], window: int, *, bound_s: float, max_work: int
) -> Order:
    """The best order found.

    Args:
        space: of what it may consist.
        starts: orders to begin with; of equal ones the first is preferred.
        window: how many ops may be in flight.
        bound_s: that no step is shorter than.
        max_work: ops and layers that may be timed.
    """
    return _Search(space, window, bound_s * (1 + _NEAR), space.timer.work + max_work).run(starts)


class _Search:
    """One search: its limits and the changes that it tries. See ``search``."""

    def __init__(self, space: Space, window: int, goal_s: float, max_work: int) -> None:
        self._space = space
        self._timer = space.timer
        self._window = window
        self._goal_s = goal_s
        self._max_work = max_work

    def run(self, starts: Sequence[Order]) -> Order:
        timed = [(self._cost(order), number) for number, order in enumerate(starts)]
        work = int(_DESCENT_WORK * self._left())
        found = [
            self._descend(starts[number], cost, work) for cost, number in sorted(timed)[:_DESCENTS]
        ]
        cost, order = min(found, key=lambda entry: entry[0])
        draw, vain = random.Random(0), 0
        while vain < _ENOUGH and self._left() > 0 and not self._is_good(cost, order):
            kicked = self._kicked(order, draw)
            tried, other = self._descend(kicked, self._cost(kicked), self._left())
            vain += 1
            if tried < cost * (1 - _GAIN):
                cost, order, vain = tried, other, 0
        return order

    def _left(self) -> int:
        return self._max_work - self._timer.work

    def _cost(self, order: Order, limit: float = math.inf) -> float:
        """Seconds of a step, and a little for each op; above the limit any such cost."""
        ops = 1 + _OP * len(order)
        return ops * self._timer.step_s(order, self._window, limit / ops)

    def _is_good(self, cost: float, order: Order) -> bool:
        return cost <= (1 + _OP * len(order)) * self._goal_s

    def _descend(self, order: Order, cost: float, work: int) -> tuple[float, Order]:
        """Goes downhill, with so much work at most.

        Only by changes that may let the op end earlier for which the step waits: what is sent
        behind that op does not matter.
        """
        stop = self._timer.work + min(work, self._left())
        return descend(
            order,
            cost,
            [
                lambda order: self._moves(order, *self._timer.critical(order, self._window)),
                lambda order: self._bucketings(order, *self._timer.critical(order, self._window)),
            ],
            timed=self._cost,
            gain=_GAIN,
            is_good=self._is_good,
            is_spent=lambda: self._timer.work > stop,
        )

    def _moves(self, order: Order, critical: int, idle: Sequence[int]) -> Iterator[Order]:
        """The critical op earlier, one in front of it behind it, or a ready one into a gap."""
        if len(order) <= _FEW:
            pairs = [(i, j) for i in range(len(order)) for j in range(len(order)) if i != j]
        else:
            pairs = [(critical, j) for j in range(critical - 1, -1, -1)]
            pairs += [(i, critical) for i in range(critical - 1, -1, -1)]
            pairs += [(i, gap) for gap in idle for i in range(gap + 1, critical)]
        for old, new in pairs:
            if _passable(order, old, new):
                yield _moved(order, old, new)

    def _bucketings(self, order: Order, critical: int, idle: Sequence[int]) -> Iterator[Order]:
        pieces = self._space.pieces_of(order)
        place = {piece: at for at, piece in enumerate(pieces)}
        seen: set[Piece] = set()
        for at in range(critical, -1, -1):
            piece = order[at].piece
            if piece in seen:
                continue
            seen.add(piece)
            yield from self._by_method(order, piece)
            for left in (place[piece] - 1, place[piece]):
                if 0 <= left < len(pieces) - 1 and pieces[left].flat == pieces[left + 1].flat:
                    yield from self._of_two(order, pieces[left], pieces[left + 1])
            yield from self._in_two(order, piece, at, critical, idle)

    def _by_method(self, order: Order, piece: Piece) -> Iterator[Order]:
        for other in self._space.every(piece.flat, piece.first, piece.last):
            if other is not piece:
                yield _swapped(order, {piece: [other]})

    def _of_two(self, order: Order, left: Piece, right: Piece) -> Iterator[Order]:
        """Joins two neighbouring pieces, or moves the border between them."""
        flat, first, border, last = left.flat, left.first, left.last, right.last
        for like in (left, right) if left.method != right.method else (left,):
            both = self._like(like, flat, first, last)
            yield _swapped(order, {left: [both], right: []})
            yield _swapped(order, {left: [], right: [both]})
        distance = 1
        while distance < last - first:
            for new in (border - distance, border + distance):
                if first < new < last:
                    shifted = {
                        left: [self._like(left, flat, first, new)],
                        right: [self._like(right, flat, new, last)],
                    }
                    yield _swapped(order, shifted)
            distance *= 2

    def _in_two(
        self, order: Order, piece: Piece, at: int, critical: int, idle: Sequence[int]
    ) -> Iterator[Order]:
        """Divides a piece in two, which are sent side by side or far from each other."""
        for middle in _middles(piece.first, piece.last):
            halves = [
                self._like(piece, piece.flat, piece.first, middle),
                self._like(piece, piece.flat, middle, piece.last),
            ]
            for pair in (halves, halves[::-1]):
                split = _swapped(order, {piece: pair})
                yield split
                if any(len(half.sends) > 1 for half in (piece, *pair)):
                    continue
                targets = (
                    range(len(split))
                    if len(split) <= _FEW
                    else [critical + 1, *(gap for gap in idle if gap < at)]
                )
                for new in targets:
                    old = at if new < at else at + 1
                    if new not in (at, at + 1):
                        yield _moved(split, old, new)

    def _like(self, piece: Piece, flat: int, first: int, last: int) -> Piece:
        """The piece between other borders, by a like method.

        That is the cheapest for its size if the given piece has the cheapest, and else the same.
        """
        cheapest = self._space.cheapest(flat, first, last)
        if piece is self._space.cheapest(piece.flat, piece.first, piece.last):
            return cheapest
        every = self._space.every(flat, first, last)
        return next((same for same in every if same.method == piece.method), cheapest)

    def _kicked(self, order: Order, draw: random.Random) -> Order:
        """The order after a few random changes, from which a descent finds another valley."""
        for _ in range(draw.choice(_KICKS)):
            piece = draw.choice(order).piece
            pieces = self._space.pieces_of(order)
            kind = draw.randrange(4)
            if kind == 0 and piece.last - piece.first > 1:
                middle = draw.randrange(piece.first + 1, piece.last)
                halves = [
                    self._like(piece, piece.flat, piece.first, middle),
                    self._like(piece, piece.flat, middle, piece.last),
                ]
                order = _swapped(order, {piece: halves})
            elif kind == 1:
                after = pieces.index(piece) + 1
                if after < len(pieces) and pieces[after].flat == piece.flat:
                    other = pieces[after]
                    both = self._like(piece, piece.flat, piece.first, other.last)
                    order = _swapped(order, {piece: [both], other: []})
            elif kind == 2:
                other = draw.choice(self._space.every(piece.flat, piece.first, piece.last))
                order = _swapped(order, {piece: [other]})
            else:
                old, new = draw.randrange(len(order)), draw.randrange(len(order))
                if _passable(order, old, new):
                    order = _moved(order, old, new)
        return order


def _middles(first: int, last: int) -> list[int]:
    """Where to try to cut a piece: everywhere in a short one, at some places in a long one."""
    length = last - first
    if length <= _FEW:
        return list(range(first + 1, last))
    steps = sorted({1, 2, 4, length // 8, length // 4, length // 2})
    return sorted({first + step for step in steps} | {last - step for step in steps})


def _moved(order: Order, old: int, new: int) -> Order:
    """The order with one op taken out and put in at another place."""
    changed = order[:old] + order[old + 1 :]
    changed.insert(new, order[old])
    return changed


def _passable(order: Order, old: int, new: int) -> bool:
    """Whether an op may move: no ops of a piece pass each other, and no gradients parameters."""
    send = order[old]
    passed = order[new:old] if new < old else order[old + 1 : new + 1]
    return all(other.piece is not send.piece and other.gathers == send.gathers for other in passed)


def _swapped(order: Order, instead: Mapping[Piece, Sequence[Piece]]) -> Order:
    """The order with the ops of some pieces replaced by those of others, stage by stage."""
    changed: Order = []
    for send in order:
        others = instead.get(send.piece)
        if others is None:
            changed.append(send)
            continue
        stage = send.stage
        ends = stage == len(send.piece.sends) - 1
        for other in others:
            changed += other.sends[stage:] if ends else other.sends[stage : stage + 1]
    return changed
