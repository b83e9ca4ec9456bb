"""Tells which rank is late, from what all ranks measure of their steps and exchange."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import median
from typing import NamedTuple

from soonest.runtime import comm
from soonest.runtime.comm import waited_s
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.device.clock import now_s
from soonest.runtime.timing.straggler import Sample, Straggler
from soonest.runtime.timing.throughput import Throughput

_EVERY = 10
"""Steps of which a rank sends the medians together."""
_UNDER_WAY = 5
"""Steps after sending at which the numbers are read. By then they have arrived, so all ranks read
them in the same step, though none waits for them."""
_LOG_PAUSE_S = 600.0
"""Pause between two lines of the log, s."""
_MOST_TOLD = 50
"""Most sentences in the history, however often ranks come to be late and cease to be."""

_log = logging.getLogger(__name__)


class _Moment(NamedTuple):
    """A time, and how long this rank has waited for others until then."""

    at_s: float
    waited_s: float

    @classmethod
    def now(cls) -> _Moment:
        return cls(now_s(), waited_s())

    def own_s(self, before: _Moment) -> float:
        """The time since then without waits, seconds."""
        return self.at_s - before.at_s - (self.waited_s - before.waited_s)


class Lateness:
    """Measures this rank's steps, and compares them with those of the others.

    It counts backward passes: no rank gets ahead in these without waiting for the others, so all
    send their numbers. No rank waits for those of another, and nothing that fails here fails
    training.

    Args:
        group: all ranks; used for nothing else, as numbers are under way while training goes on.
        failures: knows the ranks' names.
        history: gets a sentence when a rank comes to be late, and when it ceases to be.
    """

    def __init__(self, group: comm.Group, failures: FailureReporter, history: list[str]) -> None:
        self._group = group
        self._rank = group.rank()
        self._names = failures.names
        self._history = history
        self._throughput = Throughput(failures.ends)
        self._straggler = Straggler()
        self._passes = self._told = 0
        self._logged_s = -math.inf
        self._unlogged: str | None = None
        self._known_by = 0
        self._failed = False
        self._began = self._ended = None
        self._step_s: list[float] = []
        self._own_s: list[float] = []
        self._backward_s: list[float] = []
        self._under_way: deque[tuple[int, comm.Gathering]] = deque()

    def __repr__(self) -> str:
        return f"Lateness({self.told})"

    def begins(self) -> None:
        """Notes that the first gradient of a backward pass is there."""
        self._began = _Moment.now()

    def ends(self) -> None:
        """Notes that a backward pass in which all ranks take part has ended here."""
        if self._failed:
            return
        try:
            self._note(_Moment.now())
            if self._passes % _EVERY == 0:
                self._send()
            elif self._passes % _EVERY == _UNDER_WAY:
                self._take_what_has_come()
        except Exception as error:  # what it is about shows elsewhere, if it matters
            self._failed, self._straggler = True, Straggler()
            _log.debug("which rank is late is not known any more: %r", error)

    @property
    def late(self) -> str | None:
        """Says which rank is late, since when, by how much and why; None if none is."""
        named = self._straggler.named
        return named.told(self._names) if named else None

    @property
    def told(self) -> str:
        """Says the same as ``late``, or in a sentence that no rank is, or that it is not known."""
        if self._failed:
            return "which rank is late is not known any more"
        if self._known_by:
            return self.late or f"no rank is late, as of step {self._known_by}"
        return f"which rank is late is not known before step {_EVERY + _UNDER_WAY}"

    def _note(self, now: _Moment) -> None:
        self._passes += 1
        before, self._ended = self._ended, now
        if before is not None and self._began is not None:
            self._step_s.append(now.at_s - before.at_s)
            self._own_s.append(now.own_s(before))
            self._backward_s.append(now.own_s(self._began))

    def _send(self) -> None:
        times = (self._step_s, self._own_s, self._backward_s)
        step_s, own_s, backward_s = map(median, times)
        sample = Sample(step_s, own_s, backward_s, self._throughput.bps())
        for one in times:
            one.clear()
        gathering = comm.Gathering(self._group, sample.to_numbers())
        self._under_way.append((self._passes, gathering))

    def _take_what_has_come(self) -> None:
        while self._under_way and (every := self._under_way[0][1].result()) is not None:
            self._known_by, _ = self._under_way.popleft()
            samples = [Sample.from_numbers(numbers) for numbers in every]
            before = self._straggler.named
            if self._straggler.look(self._known_by - _EVERY + 1, samples):
                gone = f"{self._names[before.rank]} is no longer late" if before else ""
                self._tell(self.late or gone)
        self._log()

    def _tell(self, what: str) -> None:
        self._unlogged = what
        if self._told < _MOST_TOLD:
            self._told += 1
            self._history.append(f"step {self._known_by}: {what}")

    def _log(self) -> None:
        """Logs what has changed last, or who is still late; on one rank, and rarely."""
        what = self._unlogged or self.late
        if self._rank or what is None or now_s() < self._logged_s + _LOG_PAUSE_S:
            return
        self._logged_s, self._unlogged = now_s(), None
        _log.warning("step %d: %s", self._known_by, what)
