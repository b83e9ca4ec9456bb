"""What a lane is: it executes the ops of a plan in order, and lets others wait for them.

There is one on threads, one on streams, and one that calls a communication hook of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from soonest.errors import ReadTooEarlyError, SoonestError
from soonest.runtime.device.clock import DeviceClock
from soonest.runtime.execute.pass_state import PassState

if TYPE_CHECKING:
    from soonest.runtime.flat.param import FlatParam


class Lane(Protocol):
    """Executes passes through a plan, one after the other."""

    @property
    def clock(self) -> DeviceClock | None:
        """The clock of the device that does the work; None if that is the host."""
        ...

    def begin(self, pass_state: PassState) -> None:
        """A backward pass has begun; its ops follow those of all passes begun before."""
        ...

    def enter(self) -> None:
        """The model's forward pass begins.

        Raises:
            SoonestError: it must not run as it is about to.
        """
        ...

    def ready(self, pass_state: PassState, buckets: Sequence[int]) -> None:
        """A gradient that these buckets carry has just been written."""
        ...

    def advance(self) -> None:
        """The state of a pass has changed: there may be something to do."""
        ...

    def zero(self, pass_state: PassState, param: FlatParam) -> Callable[[], None] | None:
        """Zeroes a gradient as soon as the update that is under way needs it no more.

        Returns:
            What waits until it is zero; None if no update is under way, and nothing is done.
        """
        ...

    def wait(self, pass_state: PassState, bucket: int, *, updated: bool) -> None:
        """Returns when a bucket is reduced or, with ``updated``, its parameters have their values.

        Raises:
            SoonestError: that will not happen; the message says why.
        """
        ...

    def wait_all(self) -> None:
        """Returns when all ops are done, and the updates of all passes that were stepped."""
        ...

    def waits_for(self, limit_s: float) -> str | None:
        """Waits as ``wait_all`` does, but not for longer than a limit.

        Args:
            limit_s: seconds.

        Returns:
            What is not done then, in words; None if all is.
        """
        ...

    def spread(self, used: Iterable[Tensor] = ()) -> None:
        """Makes work on the current stream, outside of the lane, visible to all user streams.

        Args:
            used: by that work, and perhaps freed right away.
        """
        ...

    def check(self) -> None:
        """Raises what ended the lane, if something did."""
        ...

    def fail(self, error: Exception) -> None:
        """From now on everything raises this; what is in flight is dropped."""
        ...

    def close(self) -> None:
        """Ends the lane; what is in flight is dropped."""
        ...

    @property
    def error(self) -> SoonestError | None:
        """What ended the lane; None if nothing has."""
        ...


def read_too_early(pass_state: PassState, bucket: int) -> ReadTooEarlyError:
    """The error of whoever waits for a bucket of a backward pass that still goes on."""
    return ReadTooEarlyError(
        f"a gradient in {pass_state.plan.describe(bucket)} was read inside the backward pass, "
        "where it is not reduced over the ranks yet: read it after backward() has returned"
    )
