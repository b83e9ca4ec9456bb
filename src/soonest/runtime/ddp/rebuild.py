"""Learning from a step, at the point between two at which all ranks of torch's class meet."""

from __future__ import annotations

from soonest.runtime.engine.engine import Engine
from soonest.runtime.setup import AfterStep


class Rebuild:
    """Puts off what is to be done after a step until ``DistributedDataParallel`` rebuilds buckets.

    Attributes:
        everyone: all ranks have input, and so all come there.
    """

    def __init__(self) -> None:
        self.everyone = True
        self._due = False
        self._after_step: AfterStep | None = None

    def put_off(self, after_step: AfterStep) -> AfterStep:
        """Takes what is to be done after a step, and returns what to do then instead."""
        self._after_step = after_step
        return self._stepped

    def reset(self) -> None:
        """Forgets what was put off, as another engine starts."""
        self._due, self._after_step = False, None

    def _stepped(self, engine: Engine) -> None:
        self._due = True

    def run(self, engine: Engine) -> bool:
        """Does what was put off, if there was a step; a collective call.

        Returns:
            Whether the engine runs another plan since.
        """
        if not (self._due and self.everyone and self._after_step):
            return False
        self._due = False
        latest = engine.backward.latest
        if latest is None or engine.profiler.record is not latest.record:  # it was stepped twice
            return False
        before = engine.bound_plan.plan.fingerprint
        self._after_step(engine)
        return engine.bound_plan.plan.fingerprint != before
