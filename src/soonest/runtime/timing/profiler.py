"""Chooses the steps that are watched closely, and keeps the records of the last of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.timeline import Timeline
from soonest.core.trace import Trace
from soonest.runtime.device.clock import DeviceClock, now_s
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.timing.step_record import NEVER, Record
from soonest.runtime.timing.trace import (
    Measured,
    measured,
    timeline_of,
    trace_of,
    typical,
    updating_s,
)

_LOOK_S = 30e-6
"""Cost, s, of noting when one parameter is needed."""
_FRACTION = 1e-3
"""The fraction of the time of training that this may cost."""
_REMEMBERED = 20
"""Closely watched steps of which measured times are the medians."""


class Attention:
    """Chooses the steps to watch closely: all while learning, then few enough to cost nothing.

    Args:
        params: how many parameters.

    Attributes:
        learning: all steps are watched closely.
    """

    def __init__(self, params: int) -> None:
        self._pause_s = params * _LOOK_S / _FRACTION
        self._next_s = -math.inf
        self.learning = False

    def closely(self) -> bool:
        """Whether to watch the step that begins now."""
        now = now_s()
        if now < self._next_s and not self.learning:
            return False
        self._next_s = now + self._pause_s
        return True

    def refresh(self) -> None:
        """Lets the next step be watched, as steps may differ from now on."""
        self._next_s = -math.inf


class Profiler:
    """Keeps the records of the steps of one engine.

    Args:
        model: a name for it.
        params: how many parameters it has.
        clock: of the device that runs the steps; the host's if None.

    Attributes:
        attention: which steps to watch closely.
        record: of the step that the next forward pass belongs to.
        observing: the order in which parameters are used is not known yet.
        observed: the record that shows that order, once a backward pass has followed.
    """

    record: Record
    observed: Record

    def __init__(self, model: str, params: int, clock: DeviceClock | None) -> None:
        self._model = model
        self._clock = clock
        self.attention = Attention(params)
        self.observing = True
        self._forward_ended = NEVER
        self._last: tuple[Record, Plan, Sequence[FlatParam]] | None = None
        self._complete: deque[Record] = deque(maxlen=_REMEMBERED)

    def bind(self, plan: Plan, params: Sequence[FlatParam]) -> None:
        """Records steps of this plan on these parameters from now on."""
        self._plan, self._params = plan, params
        self._complete.clear()
        self.attention.refresh()
        self.record = self.new_record()

    def new_record(self, *, closely: bool = True) -> Record:
        """Makes a record with nothing in it."""
        sizes = (len(self._params), len(self._plan.ops), len(self._plan.buckets))
        return Record(*sizes, closely=closely, clock=self._clock)

    def forward_ended(self) -> None:
        """Notes that a forward pass of the user's has ended."""
        self._forward_ended = self._now()
        if math.isnan(self.record.forward_ended):
            self.record.forward_ended = self._forward_ended

    def backward_begins(self) -> Record:
        """Ends a step, as the backward pass of the next one begins.

        Returns:
            The record of the next one.
        """
        record = self.new_record(closely=self.attention.closely())
        record.backward_began = self._forward_ended
        if math.isnan(self._forward_ended):  # the user does not call the model itself
            record.backward_began = self._now()
        if self.observing:
            self.observing = False
            self.observed = self.record
        self.record.ended = record.backward_began
        if self.record.complete:
            self._last = (self.record, self._plan, self._params)
            self._complete.append(self.record)
        return record

    def _now(self) -> float:
        return now_s() if self._clock is None else self._clock.now()

    def measured(self, network: Network) -> Measured:
        """Times of ops in the last steps that were watched closely."""
        return measured(list(self._complete), self._plan, network)

    def timeline(self) -> Timeline | None:
        """A timeline of the last step that was watched closely; None before there is one."""
        return timeline_of(*self._last) if self._last else None

    def trace(self) -> Trace | None:
        """A trace of the model from the steps that were watched closely; None if none were."""
        parts = self._plan.ranks if self._plan.sharded else 1
        found = [
            trace_of(r, r, self._params, model=self._model, update_s=parts * updating_s(r))
            for r in list(self._complete)
        ]
        return typical(found) if found else None
