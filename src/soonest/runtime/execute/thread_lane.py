"""The lane for CPUs, on threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soonest.errors import SoonestError
from soonest.runtime.comm import LOOK_S, Running, ended, waiting
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.device.threads import PROCESS_ENDS, Helper
from soonest.runtime.execute.lane import read_too_early
from soonest.runtime.execute.lane_failure import LaneFailure
from soonest.runtime.execute.pass_queue import PassQueue
from soonest.runtime.execute.pass_state import REDUCED, PassState
from soonest.runtime.guard import modes
from soonest.runtime.timing.spans import of_bucket, of_op, span

if TYPE_CHECKING:
    from soonest.runtime.flat.param import FlatParam


class ThreadLane:
    """The lane of the CPU: one thread starts gloo's asynchronous ops, another waits for their ends.

    Updates run in the thread that waits for them, or in the starting one where that one cannot. A
    third looks whether another rank has given up, and lets such a rank know where this one is.

    Args:
        timeout_s: how long to wait without any progress, seconds; an op's own timeout comes before.
        failures: asks the other ranks who is at fault, and tells them what is wrong here.
    """

    clock = None

    def __init__(self, *, timeout_s: float, failures: FailureReporter) -> None:
        self._timeout_s = timeout_s
        self._failure = LaneFailure(failures, self._drop)
        self._passes = PassQueue()
        self._news: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: no more
        # In the order in which they were started.
        self._running: queue.SimpleQueue[Running | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._issuing = threading.Lock()
        self._updating = threading.Lock()
        self._delegated = 0
        self._progressed_at = time.monotonic()
        self._over = threading.Event()
        runs = {"start": self._start_ops, "end": self._end_ops, "watch": self._watch}
        self._threads = [
            Helper(partial(self._run, run), name, failures.cut_connections)
            for name, run in runs.items()
        ]

    def __repr__(self) -> str:
        return f"<ThreadLane: passes {self._passes!r}>"

    @property
    def error(self) -> SoonestError | None:
        return self._failure.error

    def begin(self, pass_state: PassState) -> None:
        with self._changed:
            self._passes.add(pass_state)

    def enter(self) -> None: ...

    def ready(self, pass_state: PassState, buckets: Sequence[int]) -> None: ...

    def advance(self) -> None:
        with self._changed:
            self._passes.note_owing()
        self._news.put(True)

    def zero(self, pass_state: PassState, param: FlatParam) -> Callable[[], None] | None:
        last = pass_state.bound_plan.last_of[param.order]
        with self._changed:
            if pass_state.step is None or pass_state.states[last] >= pass_state.final:
                return None
            pass_state.step.zeroed.add(param.order)
            return _nothing

    def wait(self, pass_state: PassState, bucket: int, *, updated: bool) -> None:
        states, enough = pass_state.states, pass_state.final if updated else REDUCED
        if states[bucket] >= enough:
            return
        if not pass_state.closed:
            raise read_too_early(pass_state, bucket)
        began_at = time.monotonic()
        with span(of_bucket, "wait for", pass_state.plan, bucket), self._updates_here() as here:
            here = here and updated
            while states[bucket] < enough:
                self.check()
                if not (here and self._update()):
                    self._wait_for_news_until(lambda: states[bucket] >= enough, here=here)
                self._give_up_in_time(began_at, pass_state, bucket)

    def spread(self, used: Iterable[Tensor] = ()) -> None: ...

    def check(self) -> None:
        self._failure.check()
        if not all(thread.is_alive() for thread in self._threads):
            raise SoonestError("a thread that communicates has ended, so nothing can arrive")

    def wait_all(self) -> None:
        self._wait_all(None)

    def waits_for(self, limit_s: float) -> str | None:
        over_at = time.monotonic() + limit_s
        if self._wait_all(over_at):
            return None
        pass_state = self._passes.unsettled
        return pass_state.place() if pass_state else "what is in flight"

    def _wait_all(self, over_at: float | None) -> bool:
        """Whether all is done, by a point in time if there is one."""
        began_at = time.monotonic()
        with self._updates_here() as here:
            while self._passes.unsettled is not None:
                self.check()
                if not (here and self._update()):
                    self._wait_for_news_until(lambda: self._passes.unsettled is None, here=here)
                if over_at is not None and time.monotonic() > over_at:
                    return self._passes.unsettled is None
                if (pass_state := self._passes.unsettled) is not None:
                    self._give_up_in_time(began_at, pass_state)
        self._failure.check()  # after a failure nothing is left to wait for
        return True

    def _give_up_in_time(
        self, began_at: float, pass_state: PassState, bucket: int | None = None
    ) -> None:
        """Ends the lane if nothing has moved for too long; what ends its own waits comes before."""
        idle_s = time.monotonic() - max(began_at, self._progressed_at)
        if idle_s <= self._timeout_s + LOOK_S or self._failure.is_asking:
            return
        late = TimeoutError(f"nothing has moved for {idle_s:.0f} s")
        self._failure.not_reduced(pass_state.place(bucket), late)
        self.check()

    @contextmanager
    def _updates_here(self) -> Iterator[bool]:
        """Whether the calling thread may run updates itself; if not, the lane's own does so.

        A caller would only wait, and another thread would take the interpreter from it, and a core.
        """
        if modes.is_plain():
            yield True
            return
        with self._changed:
            self._delegated += 1
        self._news.put(True)
        try:
            yield False
        finally:
            with self._changed:
                self._delegated -= 1

    def _wait_for_news_until(self, over: Callable[[], bool], *, here: bool) -> None:
        """Waits, unless it is over by now or there is something to update here."""
        with self._changed:
            if not over() and not (here and self._passes.next_update()):
                with waiting():
                    self._changed.wait(LOOK_S)

    def _end_threads(self) -> None:
        self._over.set()
        self._news.put(False)
        self._running.put(None)

    def close(self) -> None:
        self._end_threads()
        for thread in self._threads:
            if threading.current_thread() is not thread:
                thread.join(timeout=LOOK_S)

    def _run(self, run: Callable[[], None]) -> None:
        # Pending tensors wait when they are used, but what is used here is what they wait for.
        with torch._C.DisableTorchFunctionSubclass():
            try:
                run()
            except Exception as error:
                self.fail(error)

    def _start_ops(self) -> None:
        while self._news.get() and self.error is None:
            while self._issue() or (self._updates_in_lane() and self._update()):
                pass

    def _updates_in_lane(self) -> bool:
        """Whether not to wait until somebody needs what is updated: others may wait for it, too."""
        return self._delegated > 0 or any(pass_state.plan.sharded for pass_state in self._passes)

    def _end_ops(self) -> None:
        while (running := self._running.get()) is not None:
            while not self._complete(running):
                if self.error is not None or PROCESS_ENDS.is_set():
                    return
            self._issue()
            if self._updates_in_lane():
                self._news.put(True)

    def _complete(self, running: Running) -> bool:
        """Waits for the oldest op in flight; False if it is still so after a while."""
        pass_state = self._passes.in_flight
        if pass_state is None:  # all was taken away from here: something failed
            return False
        op = pass_state.completed
        try:
            with span(of_op, pass_state.plan, op):
                while running.work is not None:
                    if not ended(running.work):
                        return False
                    running.go_on()
        except RuntimeError as error:
            raise self._failure.not_reduced(pass_state.place(), error) from error
        pass_state.record.op_ended(op)
        with self._changed:
            pass_state.bound_plan.complete_op(pass_state)
            self._passes.note_owing()
            self._changed.notify_all()
        self._progressed_at = time.monotonic()
        return True

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self._look_around()

    def _look_around(self) -> None:
        """Ends the lane if another rank has found out that somebody is lost."""
        pass_state = self._passes.in_flight
        if pass_state is None:
            self._failure.answer(self._passes.where())
            return
        self._failure.ask(pass_state.place())

    def _issue(self) -> bool:
        """Starts the next op; False if that cannot be yet."""
        with self._issuing:
            found = self._passes.next_op()
            if found is None:
                return False
            pass_state, op = found
            pass_state.record.op_started(op)
            try:
                with span(of_op, pass_state.plan, op):
                    running = pass_state.bound_plan.issue(pass_state, op)
            except RuntimeError as error:
                raise self._failure.not_reduced(pass_state.place(), error) from error
            pass_state.issue_op()
            self._running.put(running)
            return True

    def _update(self) -> bool:
        """Updates the parameters needed first among those that can be; False if there are none."""
        with self._updating, torch._C.DisableTorchFunctionSubclass(), modes.usual():
            with self._changed:
                found = self._passes.next_update()
            if found is None:
                return False
            pass_state, bucket = found
            pass_state.record.update_started(bucket)
            try:
                with span(of_bucket, "update", pass_state.plan, bucket):
                    pass_state.bound_plan.update(pass_state, bucket)
            except Exception as error:
                self.fail(error)
                self.check()
            pass_state.record.update_ended(bucket)
            with self._changed:
                pass_state.bound_plan.complete_update(pass_state, bucket)
                self._changed.notify_all()
        if pass_state.plan.sharded:  # what is updated can be gathered now
            self._news.put(True)
        self._progressed_at = time.monotonic()
        return True

    def fail(self, error: Exception) -> None:
        self._failure.fail(error)

    def _drop(self) -> None:
        with self._changed:
            self._passes.clear()
            self._changed.notify_all()
        self._end_threads()


def _nothing() -> None:
    """What has been updated has been zeroed, too."""
