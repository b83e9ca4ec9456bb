"""What to do on a signal: as Caffe, SIGINT saves and stops, SIGHUP saves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist

Effect = Literal["stop", "snapshot", "none"]
EFFECTS: tuple[Effect, ...] = ("stop", "snapshot", "none")
_CODES: dict[Effect, int] = {"none": 0, "snapshot": 1, "stop": 2}


class Requests:
    """What signals have asked for. Ranks act on it together, in the same iteration.

    Args:
        ranks: how many take part.
    """

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = ranks
        self._asked: Effect = "none"
        self._group: Any = None
        self._sent: tuple[Any, torch.Tensor] | None = None

    def ask(self, effect: Effect) -> None:
        """Notes a request; stopping goes before saving."""
        if _CODES[effect] > _CODES[self._asked]:
            self._asked = effect

    @property
    def stops(self) -> bool:
        """Whether this rank was asked to stop, and has not told the others yet."""
        return self._asked == "stop"

    def next(self) -> Effect:
        """What to do now: all ranks must call this equally often.

        On several ranks it is what any of them was asked for before the last call, so that nobody
        waits for a message that queues behind gradients.
        """
        asked, self._asked = self._asked, "none"
        if self._ranks == 1:
            return asked
        if self._group is None:  # Its own, so that it waits for no gradients.
            self._group = dist.new_group(backend="gloo")
        before = self._finished()
        code = torch.tensor(_CODES[asked])
        work = dist.all_reduce(code, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._sent = (work, code)
        return before

    def _finished(self) -> Effect:
        if self._sent is None:
            return "none"
        work, code = self._sent
        work.wait()
        self._sent = None
        return next(effect for effect, value in _CODES.items() if value == int(code))

    def close(self) -> None:
        """Waits for what is under way."""
        self._finished()


@contextmanager
def caught(requests: Requests, *, sigint: Effect, sighup: Effect) -> Iterator[None]:
    """Takes the two signals while inside.

    Args:
        requests: where they are noted.
        sigint: what SIGINT asks for.
        sighup: what SIGHUP asks for.
    """
    effects: dict[int, Effect] = {signal.SIGINT: sigint, signal.SIGHUP: sighup}
    before = {
        number: signal.signal(number, lambda got, frame: requests.ask(effects[got]))
        for number in effects
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
