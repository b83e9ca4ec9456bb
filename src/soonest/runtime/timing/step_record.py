"""The record of one step: what happened when."""

from __future__ import annotations

import math

from soonest.runtime.device.clock import DeviceClock, now_s

NEVER = math.nan
"""The time of what did not happen."""


class Record:
    """One step: a backward pass and the forward pass after it.

    All times are seconds on one clock; ``NEVER`` where something did not happen.

    Args:
        params: how many parameters.
        ops, buckets: how many the plan has.
        closely: whether to note when each parameter is needed; otherwise only the first of those
            that are updated together.
        clock: of the device that runs the step; the host's if None. With a device's, times are the
            host's until ``settle`` is called.

    Attributes:
        backward_began, backward_ended, forward_ended, ended: when that was; ``ended`` is the begin
            of the next step's backward pass.
        ready: per parameter, when its gradient was in the buffer.
        needed, arrived: per parameter, when the forward pass needed it, and when it had its value.
        op_start, op_end: per op of the plan.
        update_start, update_end: per bucket.
    """

    def __init__(
        self,
        params: int,
        ops: int = 0,
        buckets: int = 0,
        *,
        closely: bool = True,
        clock: DeviceClock | None = None,
    ) -> None:
        self.closely = closely
        self._clock = clock if closely else None
        self.backward_began = NEVER
        self.ready = [NEVER] * params
        self.backward_ended = NEVER
        self.needed = [NEVER] * params
        self.arrived = [NEVER] * params
        self.forward_ended = NEVER
        self.ended = NEVER
        self.op_start = [NEVER] * ops
        self.op_end = [NEVER] * ops
        self.update_start = [NEVER] * buckets
        self.update_end = [NEVER] * buckets

    def __repr__(self) -> str:
        how = "closely" if self.closely else "loosely"
        state = "complete" if self.complete else "not complete"
        return f"Record({len(self.ready)} parameters, watched {how}, {state})"

    def now(self) -> float:
        """The present time on the record's clock."""
        return now_s() if self._clock is None else self._clock.now()

    def settle(self) -> None:
        """Turns all times into the device's; waits until it has done all of the step."""
        if self._clock is None:
            return
        values = [v for name in _TIMES for v in getattr(self, name)]
        seconds = iter(self._clock.seconds([*(getattr(self, n) for n in _POINTS), *values]))
        self._clock = None
        for name in _POINTS:
            setattr(self, name, next(seconds))
        for name in _TIMES:
            setattr(self, name, [next(seconds) for _ in getattr(self, name)])

    def op_started(self, op: int) -> None:
        self.op_start[op] = self.now()

    def op_ended(self, op: int) -> None:
        self.op_end[op] = self.now()

    def update_started(self, bucket: int) -> None:
        self.update_start[bucket] = self.now()

    def update_ended(self, bucket: int) -> None:
        self.update_end[bucket] = self.now()

    @property
    def complete(self) -> bool:
        """Whether it shows a whole step, from one backward pass to the next."""
        times = self.ended + self.backward_began + self.forward_ended
        return self.closely and not math.isnan(times)

    def first_use(self) -> list[int]:
        """Indices of parameters as the forward pass needed them one by one, unused ones last."""
        used = [m for m, at in enumerate(self.needed) if not math.isnan(at)]
        unused = [m for m, at in enumerate(self.needed) if math.isnan(at)]
        return sorted(used, key=self.needed.__getitem__) + unused


_POINTS = ("backward_began", "backward_ended", "forward_ended", "ended")
_TIMES = ("ready", "needed", "arrived", "op_start", "op_end", "update_start", "update_end")
