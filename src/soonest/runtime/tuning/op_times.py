"""Times single ops, and streams of them, on a piece of zeros."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from soonest.core.plan import METHODS
from soonest.runtime import comm
from soonest.runtime.comm import Piece, Ranks, Running, Wire


class Stream(NamedTuple):
    """What ops took that followed each other.

    Args:
        ops: how many.
        seconds: all of them together.
    """

    ops: int
    seconds: float


def piece_of(size_bytes: int, device: torch.device, wire: Wire) -> Piece:
    """A bucket of so many bytes, of zeros in float32, at least one element."""
    buffer = torch.zeros(max(1, size_bytes // 4), device=device)
    return Piece(buffer, buffer.clone(), wire.of(buffer.element_size()))


def warm_up(ranks: Ranks, methods: Sequence[str], piece: Piece) -> None:
    """Runs each op once, untimed.

    Devices make communicators and load kernels when they first need them, which takes seconds that
    are no cost of an op.
    """
    for kind in dict.fromkeys(kind for m in ("allreduce", *methods) for kind in METHODS[m]):
        comm.run(kind, ranks, piece)
    now_s(piece)


def times_of(kind: str, ranks: Ranks, piece: Piece, times: int) -> list[float]:
    """How long each of several ops took, run one after the other, seconds."""
    took: list[float] = []
    for _ in range(times):
        began_s = now_s(piece)
        comm.run(kind, ranks, piece)
        took.append(now_s(piece) - began_s)
    return took


def stream_of(kind: str, ranks: Ranks, piece: Piece, ops: int) -> Stream:
    """Times ops that follow each other, with two in flight."""
    pieces = [piece, Piece(piece.gradients.clone(), piece.parameters.clone(), piece.wire)]
    began_s = now_s(piece)
    flying = [comm.start(kind, ranks, pieces[0])]
    for number in range(1, ops):
        flying.append(comm.start(kind, ranks, pieces[number % 2]))
        _finish(flying.pop(0))
    _finish(flying.pop())
    return Stream(ops, now_s(piece) - began_s)


def now_s(piece: Piece) -> float:
    """The time at which the piece's device has done all that it was asked to, seconds."""
    device = piece.gradients.device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _finish(running: Running) -> None:
    while running.work is not None:
        running.work.wait()
        running.go_on()
