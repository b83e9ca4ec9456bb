"""Which steps are watched closely, and what the last of them showed."""

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
"""What it costs to note when one parameter is needed."""
_SHARE = 1e-3
"""Of the time of training, what that may take."""
_REMEMBERED = 20
"""Closely watched steps from which measured times are medians."""


class Attention:
    """Which steps to watch closely: after learning only so many that they cost next to nothing.

    Args:
        params: how many parameters.

    Attributes:
        learning: all steps are to be watched closely.
    """

    def __init__(self, params: int) -> None:
        self._pause_s = params * _LOOK_S / _SHARE
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
        """The next step is a new one."""
        self._next_s = -math.inf


class Profiler:
    """Keeps the records of the steps of one engine.

    Args:
        model: a name for it.
        params: how many parameters it has.
        clock: of the device that does it all; the host's if None.

    Attributes:
        attention: which steps to watch closely.
        record: of the step that the next forward pass belongs to.
        observing: the order in which parameters are used is not known yet.
        observed: the record that shows it, once a backward pass has followed.
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
        """From now on, steps run this plan on these parameters."""
        self._plan, self._params = plan, params
        self._complete.clear()
        self.attention.refresh()
        self.record = self.new_record()

    def new_record(self, *, closely: bool = True) -> Record:
        """One with nothing in it."""
        sizes = (len(self._params), len(self._plan.ops), len(self._plan.buckets))
        return Record(*sizes, closely=closely, clock=self._clock)

    def forward_ended(self) -> None:
        """A forward pass of the user's has ended."""
        self._forward_ended = self._now()
        if math.isnan(self.record.forward_ended):
            self.record.forward_ended = self._forward_ended

    def backward_begins(self) -> Record:
        """A step is over, as the backward pass of the next one begins.

        Returns:
            The record of that next one.
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
        """What ops took in the last steps that were watched closely."""
        return measured(list(self._complete), self._plan, network)

    def timeline(self) -> Timeline | None:
        """The last step that was watched closely; None before there is one."""
        return timeline_of(*self._last) if self._last else None

    def trace(self) -> Trace | None:
        """The model as the steps showed it that were watched closely; None before there is one."""
        parts = self._plan.ranks if self._plan.sharded else 1
        found = [
            trace_of(r, r, self._params, model=self._model, update_s=parts * updating_s(r))
            for r in list(self._complete)
        ]
        return typical(found) if found else None
