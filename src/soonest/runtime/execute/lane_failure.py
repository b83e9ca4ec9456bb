"""What ends a lane, in words that name what was waited for and the ranks at fault."""

from __future__ import annotations

import threading
from collections.abc import Callable

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime.comm.failures import FailureReporter


class LaneFailure:
    """Keeps the first error of a lane, and talks about it with the other ranks.

    After it nothing can arrive any more, on any rank, so everything that uses the lane raises it.
    Any thread may call.

    Args:
        failures: knows the other ranks.
        drop: forgets what is in flight, and ends all waits for it; called once ``error`` is there.

    Attributes:
        error: what ended the lane; None if nothing has.
        is_asking: this rank has given up, and asks the others who is at fault; that takes seconds,
            in which no other verdict is wanted.
    """

    def __init__(self, failures: FailureReporter, drop: Callable[[], None]) -> None:
        self._failures = failures
        self._drop = drop
        self._lock = threading.Lock()
        self.error: SoonestError | None = None
        self.is_asking = False

    def __repr__(self) -> str:
        return f"<LaneFailure: {self.error or 'none'}>"

    def check(self) -> None:
        """Raises what ended the lane, if something did."""
        if self.error is not None:
            raise _copy(self.error)

    def fail(self, error: Exception) -> SoonestError:
        """Ends the lane with an error, and lets the other ranks know if it is this rank's own.

        Returns:
            The error in the form in which it is to be raised.
        """
        known = (
            error
            if isinstance(error, SoonestError)
            else SoonestError(f"an update failed: {error!r}")
        )
        with self._lock:  # what follows where work is taken away is not the cause
            if self.error is not None:
                return known
            self.error = _copy(known)
        self._drop()
        if not isinstance(known, PeerLostError):
            self._failures.tell(str(known))
        return known

    def not_reduced(self, what: str, error: Exception) -> SoonestError:
        """Ends the lane as a backend has failed, or nothing has moved for too long.

        Args:
            what: was waited for, in words.
            error: of the backend.

        Returns:
            The error to raise, which says who is at fault.
        """
        self.is_asking = True
        how = "could not be reduced over the ranks"
        return self.fail(self._failures.failed(what, how, error))

    def ask(self, what: str) -> None:
        """Looks whether another rank has given up, while this one waits for something.

        Raises:
            PeerLostError: one has; that ends the lane.
        """
        if not self.is_asking and (who := self._failures.blame(what, False)) is not None:
            raise self.fail(PeerLostError(f"{what} will not be reduced over the ranks: {who}"))

    def answer(self, where: str) -> None:
        """Lets ranks that have given up know where this one is, as it waits for none of them."""
        self._failures.answer(where)


def _copy(error: SoonestError) -> SoonestError:
    """The same error without what its traceback would keep alive."""
    return type(error)(*error.args)
