"""The lane for CPUs, on threads."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime.comm import LOOK_S, Running, ended, waiting
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.device.threads import PROCESS_ENDS, Helper
from soonest.runtime.execute.lane import read_too_early
from soonest.runtime.execute.pass_state import PassState, PassStates, place
from soonest.runtime.guard import modes
from soonest.runtime.timing.spans import of_bucket, of_op, span

if TYPE_CHECKING:
    from soonest.runtime.flat.param import FlatParam


class ThreadLane:
    """One thread starts gloo's asynchronous ops, another waits for their ends.

    Updates run in the thread that waits for them, or in the starting one where that one cannot. A
    third looks whether another rank has given up, and lets such a rank know where this one is.

    Args:
        timeout_s: how long to wait without any progress; an op's own timeout comes before.
        failures: the other ranks.
    """

    clock = None

    def __init__(self, *, timeout_s: float, failures: FailureReporter) -> None:
        self._timeout_s = timeout_s
        self._failures = failures
        self._passes = PassStates()
        self._news: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: no more
        # In the order in which they were started.
        self._running: queue.SimpleQueue[Running | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._issuing = threading.Lock()
        self._updating = threading.Lock()
        self._delegated = 0
        self._latest: weakref.ref[PassState] | None = None
        self._progressed_at = time.monotonic()
        self._over = threading.Event()
        self._blaming = False
        self._error: SoonestError | None = None
        runs = {"start": self._start_ops, "end": self._end_ops, "watch": self._watch}
        self._threads = [
            Helper(partial(self._run, run), name, self._let_go) for name, run in runs.items()
        ]

    @property
    def error(self) -> SoonestError | None:
        return self._error

    def begin(self, pass_state: PassState) -> None:
        with self._changed:
            self._passes.add(pass_state)
            self._latest = weakref.ref(pass_state)

    def enter(self) -> None: ...

    def ready(self, pass_state: PassState, buckets: Sequence[int]) -> None: ...

    def advance(self) -> None:
        with self._changed:
            self._passes.note_owing()
        self._news.put(True)

    def zero(self, pass_state: PassState, param: FlatParam) -> Callable[[], None] | None:
        with self._changed:
            if (
                pass_state.step is None
                or pass_state.updated[pass_state.bound_plan.last_of[param.order]]
            ):
                return None
            pass_state.step.zeroed.add(param.order)
            return _nothing

    def wait(self, pass_state: PassState, bucket: int, *, updated: bool) -> None:
        done = pass_state.updated if updated else pass_state.reduced
        if done[bucket]:
            return
        if not pass_state.closed:
            raise read_too_early(pass_state, bucket)
        began_at = time.monotonic()
        with span(of_bucket, "wait for", pass_state.plan, bucket), self._updates_here() as here:
            here = here and updated
            while not done[bucket]:
                self.check()
                if not (here and self._update()):
                    self._wait_for_news_until(lambda: bool(done[bucket]), here=here)
                self._give_up_in_time(began_at, pass_state, bucket)

    def spread(self, used: Iterable[Tensor] = ()) -> None: ...

    def check(self) -> None:
        if self._error is not None:
            raise type(self._error)(*self._error.args)
        if not all(thread.is_alive() for thread in self._threads):
            raise SoonestError("a thread that communicates has ended, so nothing can arrive")

    def wait_all(self) -> None:
        self._wait_all(None)

    def waits_for(self, limit_s: float) -> str | None:
        over_at = time.monotonic() + limit_s
        if self._wait_all(over_at):
            return None
        pass_state = next((r for r in self._passes if not self._settled(r)), None)
        return self._place(pass_state) if pass_state else "what is in flight"

    def _wait_all(self, over_at: float | None) -> bool:
        """Whether all is done, by a point in time if there is one."""
        began_at = time.monotonic()
        with self._updates_here() as here:
            while not self._all_settled():
                self.check()
                if not (here and self._update()):
                    self._wait_for_news_until(self._all_settled, here=here)
                if over_at is not None and time.monotonic() > over_at:
                    return self._all_settled()
                if (
                    pass_state := next((r for r in self._passes if not self._settled(r)), None)
                ) is None:
                    continue
                self._give_up_in_time(began_at, pass_state)
        if self._error is not None:  # then there is nothing left to wait for
            self.check()
        return True

    def _give_up_in_time(
        self, began_at: float, pass_state: PassState, bucket: int | None = None
    ) -> None:
        """Ends the lane if nothing has moved for too long; what ends its own waits comes before."""
        idle_s = time.monotonic() - max(began_at, self._progressed_at)
        if idle_s <= self._timeout_s + LOOK_S or self._blaming:
            return
        what = self._place(pass_state, bucket)
        late = TimeoutError(f"nothing has moved for {idle_s:.0f} s")
        self.fail(self._failures.failed(what, "could not be combined over the ranks", late))
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
            if not over() and not (here and self._next_update()):
                with waiting():
                    self._changed.wait(LOOK_S)

    def _all_settled(self) -> bool:
        return all(self._settled(pass_state) for pass_state in self._passes)

    @staticmethod
    def _settled(pass_state: PassState) -> bool:
        if pass_state.step is None and pass_state.combined >= pass_state.plan.combining:
            return True
        return pass_state.finished or not pass_state.closed

    def close(self) -> None:
        self._over.set()
        self._news.put(False)
        self._running.put(None)
        for thread in self._threads:
            if threading.current_thread() is not thread:
                thread.join(timeout=LOOK_S)

    def _let_go(self) -> None:
        """Ends a wait for a message that cannot come, as the process is about to end."""
        self._failures.cut_connections()

    def _run(self, run: Callable[[], None]) -> None:
        # Held tensors belong to the main thread; what passes here is always taken as it is.
        with torch._C.DisableTorchFunctionSubclass():
            try:
                run()
            except Exception as error:
                self.fail(error)

    def _start_ops(self) -> None:
        while self._news.get() and self._error is None:
            while self._issue() or (self._updates_in_lane() and self._update()):
                pass

    def _updates_in_lane(self) -> bool:
        """Whether not to wait until somebody needs what is updated: others may wait for it, too."""
        return self._delegated > 0 or any(pass_state.plan.sharded for pass_state in self._passes)

    def _end_ops(self) -> None:
        while (running := self._running.get()) is not None:
            while not self._complete(running):
                if self._error is not None or PROCESS_ENDS.is_set():
                    return
            self._issue()
            if self._updates_in_lane():
                self._news.put(True)

    def _complete(self, running: Running) -> bool:
        """Waits for the oldest op in flight; False if it is still so after a while."""
        pass_state = next((r for r in self._passes if r.in_flight), None)
        if pass_state is None:  # all was taken away from here: something failed
            return False
        op = pass_state.combined
        try:
            with span(of_op, pass_state.plan, op):
                while running.work is not None:
                    if not ended(running.work):
                        return False
                    running.go_on()
        except RuntimeError as error:
            raise self._stopped(pass_state, error) from error
        pass_state.record.op_ended(op)
        with self._changed:
            pass_state.complete_op()
            self._passes.note_owing()
            self._changed.notify_all()
        self._progressed_at = time.monotonic()
        return True

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self._look_around()

    def _look_around(self) -> None:
        """Ends the lane if another rank has found out that somebody is lost."""
        pass_state = next((r for r in self._passes if r.in_flight), None)
        if pass_state is None:
            self._failures.answer(self._where())
            return
        what = self._place(pass_state)
        who = None if self._blaming else self._failures.blame(what, False)
        if who is not None:
            raise PeerLostError(f"{what} will not be combined over the ranks: {who}")

    def _stopped(self, pass_state: PassState, error: Exception) -> SoonestError:
        self._blaming = True
        how = "could not be combined over the ranks"
        return self._failures.failed(self._place(pass_state), how, error)

    @staticmethod
    def _place(pass_state: PassState, bucket: int | None = None) -> str:
        """What is waited for, in words: by default what comes next."""
        if bucket is None:
            op = min(pass_state.combined, len(pass_state.plan.ops) - 1)
            bucket = pass_state.plan.ops[op].bucket
        return place(pass_state.plan, pass_state.number, bucket, local=pass_state.local)

    def _where(self) -> str:
        """Where the training loop is, in words."""
        pass_state = self._latest() if self._latest is not None else None
        if pass_state is None:
            return "not in a step"
        if not pass_state.closed:
            return f"in the backward pass of step {pass_state.number}"
        if pass_state.step is None:
            return f"between the backward pass and optimizer.step() of step {pass_state.number}"
        return f"behind optimizer.step() of step {pass_state.number}"

    def _issue(self) -> bool:
        """Starts the next op; False if that cannot be yet."""
        with self._issuing:
            found = self._next_op()
            if found is None:
                return False
            pass_state, op = found
            pass_state.record.op_started(op)
            try:
                with span(of_op, pass_state.plan, op):
                    running = pass_state.bound_plan.issue(pass_state, op)
            except RuntimeError as error:
                raise self._stopped(pass_state, error) from error
            pass_state.issued += 1
            self._running.put(running)
            return True

    def _next_op(self) -> tuple[PassState, int] | None:
        pass_state = next((r for r in self._passes if r.issued < r.ops), None)
        op = pass_state.next_op() if pass_state is not None else None
        return None if pass_state is None or op is None else (pass_state, op)

    def _update(self) -> bool:
        """Updates the parameters needed first among those that can be; False if there are none."""
        with self._updating, torch._C.DisableTorchFunctionSubclass(), modes.usual():
            found = self._next_update()
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
                pass_state.complete_update(bucket)
                self._changed.notify_all()
        if pass_state.plan.sharded:  # what is updated can be shared now
            self._news.put(True)
        self._progressed_at = time.monotonic()
        return True

    def _next_update(self) -> tuple[PassState, int] | None:
        with self._changed:
            pass_state = self._passes.first()
            bucket = pass_state.next_update() if pass_state is not None else None
            return None if pass_state is None or bucket is None else (pass_state, bucket)

    def fail(self, error: Exception) -> None:
        known = (
            error
            if isinstance(error, SoonestError)
            else SoonestError(f"an update failed: {error!r}")
        )
        with self._changed:
            # What follows in the other thread, whose work is taken away here, is not the cause.
            # Without what a traceback would keep alive.
            self._error = self._error or type(known)(*known.args)
            self._passes.clear()
            self._changed.notify_all()
        self._over.set()
        self._news.put(False)
        self._running.put(None)
        if not isinstance(known, PeerLostError):
            self._failures.tell(str(known))


def _nothing() -> None:
    """What has been updated has been zeroed, too."""
