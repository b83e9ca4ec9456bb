"""Waits for ops in flight in short steps, so that signals and other ranks' failures are seen."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from soonest.runtime.comm import unfinished

LOOK_S = 0.5
"""Poll interval, s: how often a waiting rank checks for failed ranks."""


class Work(Protocol):
    """An op in flight, as torch's ``Work``."""

    def wait(self, timeout: datetime.timedelta = ...) -> bool: ...
    def is_completed(self) -> bool: ...


_look: ContextVar[Callable[[], None] | None] = ContextVar("soonest_look", default=None)


@contextmanager
def looking(look: Callable[[], None]) -> Iterator[None]:
    """Lets ``finish`` call this now and then within this context; what it raises ends the wait."""
    token = _look.set(look)
    try:
        yield
    finally:
        _look.reset(token)


def look() -> None:
    """Calls what ``looking`` was given, if anything."""
    if (given := _look.get()) is not None:
        given()


_waited_s = 0.0


def waited_s() -> float:
    """Seconds for which the user's threads have waited for other ranks so far in this process."""
    return _waited_s


@contextmanager
def waiting() -> Iterator[None]:
    """Counts the time within this context as waiting for other ranks, see ``waited_s``."""
    global _waited_s
    began_s = time.perf_counter()
    try:
        yield
    finally:
        _waited_s += time.perf_counter() - began_s


def ended(work: Work) -> bool:
    """Waits until an op has ended; False if it is still in flight after a while.

    Raises:
        RuntimeError: it failed.
    """
    try:
        work.wait(datetime.timedelta(seconds=LOOK_S))
    except RuntimeError:
        if not work.is_completed():
            return False
        unfinished.over(work)
        work.wait()  # says whether it ended just now, or why it failed
    unfinished.over(work)
    return True


def finish(work: Work, *, on_device: bool = False) -> None:
    """Waits until an op has ended.

    Args:
        work: the op.
        on_device: the host need not wait then: it only enqueues what follows behind the op.

    Raises:
        RuntimeError: it failed.
    """
    if on_device:
        work.wait()
        return
    unfinished.begun(work)
    with waiting():
        while not ended(work):
            look()
