"""The phases of choosing a plan, and how a tuner came to be in one."""

from __future__ import annotations

from collections import deque
from enum import Enum

_REMEMBERED = 20
"""Events of the history that an illegal transition tells."""


class Phase(Enum):
    """What the tuner does with the steps of training."""

    WARM_UP = "warm-up"
    """The first step shows in which order parameters are used. On a device a few before it, in
    which memory is found and kernels are chosen, teach nothing."""
    OBSERVE = "observe"
    """A few steps under a first plan show how long layers and ops take."""
    TRIALS = "trials"
    """The candidates are tried, a few steps each, and timed."""
    SETTLED = "settled"
    """The fastest plan is selected. Steps are watched for a change that lasts."""


_LEGAL: dict[Phase, set[Phase]] = {
    # Other parameters may come to be trained at any time, and training may be resumed with the
    # plan that was selected before.
    Phase.WARM_UP: {Phase.WARM_UP, Phase.OBSERVE, Phase.SETTLED},
    Phase.OBSERVE: {Phase.WARM_UP, Phase.TRIALS, Phase.SETTLED},
    Phase.TRIALS: {Phase.WARM_UP, Phase.SETTLED},
    Phase.SETTLED: {Phase.WARM_UP, Phase.OBSERVE},
}
"""The phases that may follow each."""


class PhaseHistory:
    """The phase of a tuner, and the last events that led to it.

    Attributes:
        phase: the present one.
    """

    def __init__(self) -> None:
        self.phase = Phase.WARM_UP
        self._events: deque[str] = deque(maxlen=_REMEMBERED)

    def __repr__(self) -> str:
        last = f", last: {self._events[-1]}" if self._events else ""
        return f"PhaseHistory({self.phase.value}{last})"

    def note(self, step: int, what: str) -> None:
        """Remembers an event.

        Args:
            step: the number of the step in which it happened.
            what: in words.
        """
        self._events.append(f"step {step}: {what}")

    def enter(self, phase: Phase, step: int, why: str) -> None:
        """Goes on to another phase; there is no other way to one.

        Args:
            phase: the next one.
            step: the number of the step after which that is.
            why: in words.

        Raises:
            AssertionError: that phase cannot follow the present one; the message has the history.
        """
        if phase not in _LEGAL[self.phase]:
            legal = ", ".join(one.value for one in Phase if one in _LEGAL[self.phase])
            raise AssertionError(
                f"tuning cannot go from {self.phase.value!r} to {phase.value!r} after step {step} "
                f"({why}), only to {legal}: this is an error in soonest, please report it with "
                f"what came before: {'; '.join(self._events) or 'nothing'}"
            )
        self.note(step, f"{self.phase.value} → {phase.value}, {why}")
        self.phase = phase
