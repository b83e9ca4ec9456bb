"""Single messages between two ranks."""

from __future__ import annotations

import datetime
from typing import Any

from torch import Tensor

from soonest.runtime.comm.topology import Group
from soonest.runtime.comm.waiting import Work


def receive(group: Group, part: Tensor, source: int, tag: int) -> list[Work]:
    """Starts to receive a tensor from a rank; nothing is sent if it has no elements."""
    return [_Message(group.recv([part], source, tag))] if part.numel() else []


def send(group: Group, part: Tensor, target: int, tag: int) -> list[Work]:
    """Starts to send a tensor to a rank; nothing is sent if it has no elements."""
    return [_Message(group.send([part], target, tag))] if part.numel() else []


class _Message:
    """A message in flight, of which a wait never ends early: gloo would close all connections."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._over = False
        self._error: RuntimeError | None = None

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        if self._error is not None:  # another wait would last another time-out
            raise self._error
        try:
            return self._work.wait()
        except RuntimeError as error:
            self._error = error
            raise
        finally:
            self._over = True

    def is_completed(self) -> bool:
        return self._over
