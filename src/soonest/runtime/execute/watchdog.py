"""What a device has been given to do and has not been seen to end."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.device.streams import Event

_LOOK_S = 1.0
"""An op that takes longer lets this ask whether another rank has given up."""
_DRAIN_LOOK_S = 1e-3


class _Entry(NamedTuple):
    """Something enqueued.

    Args:
        end: of it.
        what: says it in words.
        since_s: when it was enqueued.
    """

    end: Event
    what: Callable[[], str]
    since_s: float


class Enqueued:
    """What is under way, the oldest first; looking at it never waits.

    Args:
        timeout_s: how long nothing may come to an end.
        failures: the other ranks.
        broken: says what the backend knows to have failed; None if nothing has.

    Attributes:
        error: what ended it all.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        failures: FailureReporter,
        broken: Callable[[], str | None],
    ) -> None:
        self._timeout_s = timeout_s
        self._failures = failures
        self._broken = broken
        self._entries: deque[_Entry] = deque()
        self._progressed_s = self._asked_s = time.monotonic()
        self.error: SoonestError | None = None

    def add(self, end: Event, what: Callable[[], str]) -> None:
        self._entries.append(_Entry(end, what, time.monotonic()))

    def look(self) -> None:
        """Forgets what has ended.

        Raises:
            SoonestError: something failed, or does not end.
        """
        if self.error is not None:
            raise type(self.error)(*self.error.args)
        entries = self._entries
        try:
            while entries and entries[0].end.query():
                entries.popleft()
                self._progressed_s = time.monotonic()
        except RuntimeError as error:
            raise self.stopped(entries[0].what(), error) from error
        if not entries:
            return
        oldest = entries[0]
        if (why := self._broken()) is not None:
            raise self.stopped(oldest.what(), RuntimeError(why))
        now = time.monotonic()
        idle_s = now - max(oldest.since_s, self._progressed_s)
        if idle_s > self._timeout_s:
            raise self.stopped(oldest.what(), TimeoutError(f"nothing has moved for {idle_s:.0f} s"))
        if idle_s > _LOOK_S and now - self._asked_s > _LOOK_S:
            self._asked_s = now
            what = oldest.what()
            if (who := self._failures.blame(what, False)) is not None:
                raise self.fail(PeerLostError(f"{what} will not be combined over the ranks: {who}"))

    def drain(self, limit_s: float = math.inf) -> str | None:
        """Lets the host wait until nothing is under way, or for so long.

        Returns:
            What is under way then, in words; None if nothing is.

        Raises:
            SoonestError: as ``look``.
        """
        over_s = time.monotonic() + limit_s
        while self._entries:
            self.look()
            if self._entries:
                if time.monotonic() > over_s:
                    return self._entries[0].what()
                time.sleep(_DRAIN_LOOK_S)
        return None

    def stopped(self, what: str, error: Exception) -> SoonestError:
        """Takes note that something could not be done, and who is at fault; to be raised."""
        how = "could not be combined over the ranks"
        return self.fail(self._failures.failed(what, how, error))

    def fail(self, error: Exception) -> SoonestError:
        """Takes note of an error, also for the other ranks.

        Returns:
            What is to be raised now, and is raised again whenever this is used.
        """
        known = (
            error
            if isinstance(error, SoonestError)
            else SoonestError(f"an update failed: {error!r}")
        )
        self.error = self.error or type(known)(*known.args)
        self._entries.clear()
        if not isinstance(known, PeerLostError):
            self._failures.tell(str(known))
        return known
