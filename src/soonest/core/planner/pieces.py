"""The numbers of a bucket that a search needs, and of its ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A bucket, in numbers.

    Args:
        flat: index of its flat buffer.
        first, last: indices of the cut points where it starts and stops.
        method: how it is reduced.
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
        tail_s: what must still be computed once its piece is there with it; minus infinity if it
            is not the last of its piece.
        stage: how many ops of its piece come before it.
        gathers: whether it gathers parameters, behind an update.
        piece: whose op this is.
    """

    ready_s: float
    latency_s: float
    transfer_s: float
    tail_s: float
    stage: int
    gathers: bool
    piece: Piece
