"""The lane for devices with streams: no thread, and the host never waits.

Everything is enqueued by the training loop itself: ops by its hooks, in plan order, as gradients
are produced, and all updates by ``optimizer.step()``, what the forward pass needs first in front.
Two streams run them side by side, for when updates come, all ops of the backward pass are enqueued
already, and the first update must not wait for the last op. Events order the two, and the streams
on which the user computes:

- an op waits for the streams that produced its gradients;
- an update waits for its bucket's op, and for all that the user had enqueued before ``step()``;
- whoever reads or overwrites a tensor in flight waits for the op or update that it is in.

So to land is to let streams wait: the current one, and all others that the user has been seen to
compute on, as what has landed is no longer guarded.

Memory is safe without further care: buffers live until the host has seen the end of all that uses
them; temporaries are made and used on one stream, and what a backend uses on a stream of its own it
keeps until it is waited for. Only what the optimizer is given from outside needs ``Streams.keep``:
gradients of the user's own, the scale of a ``GradScaler``, a learning rate, a loaded state.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from soonest.core.plan import SHARED_PARAMETERS
from soonest.errors import SoonestError
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.comm.signals import is_from_handler
from soonest.runtime.device.clock import DeviceClock
from soonest.runtime.device.streams import Event, Stream, Streams
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.execute.lane import read_too_early
from soonest.runtime.execute.pass_state import PassState, place
from soonest.runtime.execute.watchdog import Enqueued
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.guard import modes, pending
from soonest.runtime.timing.spans import of_bucket, of_op, span


class _Mark(NamedTuple):
    """A point in one of the lane's streams.

    Args:
        stream: which one.
        number: how many marks of it came before.
        event: the point.
    """

    stream: Stream
    number: int
    event: Event


class _Flight:
    """Where a pass is on the streams.

    Args:
        buckets: how many.

    Attributes:
        producers: per bucket, the streams on which its gradients are produced.
        reduced, shared, updated: per bucket, the point at which this is so; None before it is
            enqueued, and where nothing needs to be waited for.
        stepped: the updates have been enqueued.
    """

    def __init__(self, buckets: int) -> None:
        self.producers: list[dict[Stream, None]] = [{} for _ in range(buckets)]
        self.reduced: list[_Mark | None] = [None] * buckets
        self.shared: list[_Mark | None] = [None] * buckets
        self.updated: list[_Mark | None] = [None] * buckets
        self.stepped = False


class StreamLane:
    """A lane for devices with streams.

    Args:
        streams: of the device.
        timeout_s: how long nothing may come to an end that has been enqueued.
        failures: the other ranks.
        broken: says what the backend knows to have failed; None if nothing has.
    """

    def __init__(
        self,
        streams: Streams,
        *,
        timeout_s: float,
        failures: FailureReporter,
        broken: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._streams = streams
        self.clock = DeviceClock(streams)
        self._enqueued = Enqueued(timeout_s=timeout_s, failures=failures, broken=broken)
        self._ops, self._updates = streams.make(), streams.make()
        self._last: dict[Stream, _Mark] = {}
        # By stream that waits and stream of the lane: up to which mark it has waited.
        self._reached: dict[tuple[Stream, Stream], int] = {}
        self._users: tuple[Stream, ...] = ()  # replaced, never changed: any thread may read
        # Neither keeps alive a training that nobody refers to any more; only its memory, while the
        # device may still use that.
        self._pass_state: weakref.ref[PassState] | None = None
        self._bound_plan: weakref.ref[BoundPlan] | None = None
        self._memory: list[Tensor] = []
        self._flights: weakref.WeakKeyDictionary[PassState, _Flight] = weakref.WeakKeyDictionary()

    @property
    def error(self) -> SoonestError | None:
        return self._enqueued.error

    def begin(self, pass_state: PassState) -> None:
        self._see_user()
        if self._pass_state is not None and (earlier := self._pass_state()) is not None:
            earlier.superseded = True
        if self._bound_plan is None or self._bound_plan() is not pass_state.bound_plan:
            self._drain()
            self._bound_plan = weakref.ref(pass_state.bound_plan)
            self._memory = pass_state.bound_plan.memory()
        self._pass_state = weakref.ref(pass_state)
        self._flights[pass_state] = _Flight(len(pass_state.plan.buckets))

    def enter(self) -> None:
        self._refuse_graphs()

    def ready(self, pass_state: PassState, buckets: Sequence[int]) -> None:
        producer = self._see_user()
        flight = self._flights[pass_state]
        for bucket in buckets:
            flight.producers[bucket][producer] = None

    def advance(self) -> None:
        pass_state = self._pass_state() if self._pass_state is not None else None
        if pass_state is None or self.error is not None:
            return
        # Held tensors belong to the user; what passes here is always taken as it is.
        with torch._C.DisableTorchFunctionSubclass():
            flight = self._flights[pass_state]
            self._enqueue_ops(pass_state, flight)
            if pass_state.step is not None and not flight.stepped:
                flight.stepped = True
                self._enqueue_updates(pass_state, flight)
                self._enqueue_ops(pass_state, flight)

    # Ops

    def _enqueue_ops(self, pass_state: PassState, flight: _Flight) -> None:
        # A bucket may be made of what several streams produced, and a stream have several ready.
        produced: dict[Stream, Event] = {}
        while (op := pass_state.next_op()) is not None:
            bucket = pass_state.plan.ops[op].bucket
            if pass_state.plan.before[op] < 0:
                for stream in flight.producers[bucket]:
                    if stream not in produced:
                        produced[stream] = self._streams.record(stream)
                        self._streams.wait(self._ops, produced[stream])
            if (updated := flight.shared[bucket]) is not None:
                self._follow(self._ops, updated)
            mark = self._run_op(pass_state, op)
            if pass_state.plan.ops[op].kind == SHARED_PARAMETERS:
                flight.updated[bucket] = mark
            elif op in pass_state.plan.reduces:
                flight.reduced[bucket] = mark

    def _run_op(self, pass_state: PassState, op: int) -> _Mark:
        plan, number = pass_state.plan, pass_state.number
        what = partial(place, plan, number, plan.ops[op].bucket, local=pass_state.local)
        with self._streams.use(self._ops):
            pass_state.record.op_started(op)
            for own in pass_state.bound_plan.kept_in(pass_state, pass_state.plan.ops[op].bucket):
                self._streams.keep(own, self._ops)
            try:
                with span(of_op, pass_state.plan, op):
                    running = pass_state.bound_plan.issue(pass_state, op)
                    while running.work is not None:
                        running.work.wait()
                        running.go_on()
            except torch.OutOfMemoryError as error:  # no other rank is at fault
                raise self._enqueued.fail(
                    SoonestError(f"{what()} was not sent: {error}")
                ) from error
            except RuntimeError as error:
                if is_from_handler(error):
                    self._enqueued.fail(SoonestError(f"{what()} was interrupted: {error}"))
                    raise
                raise self._enqueued.stopped(what(), error) from error
            pass_state.record.op_ended(op)
            pass_state.issued += 1
            pass_state.complete_op()
        mark = self._mark(self._ops)
        self._enqueued.add(mark.event, what)
        return mark

    # Updates

    def _enqueue_updates(self, pass_state: PassState, flight: _Flight) -> None:
        """What is needed first comes first: in the plan's order that would often be the last."""
        self._wait_for_now(self._updates)
        self._keep(pass_state)
        marks = flight.shared if pass_state.plan.sharded else flight.updated
        with self._streams.use(self._updates), modes.usual():
            for bucket in pass_state.bound_plan.by_need:
                if (reduced := flight.reduced[bucket]) is not None:
                    self._follow(self._updates, reduced)
                pass_state.record.update_started(bucket)
                try:
                    with span(of_bucket, "update", pass_state.plan, bucket):
                        pass_state.bound_plan.update(pass_state, bucket)
                except Exception as error:
                    raise self._enqueued.fail(error) from error
                pass_state.record.update_ended(bucket)
                pass_state.complete_update(bucket)
                marks[bucket] = self._mark(self._updates)

    def _keep(self, pass_state: PassState) -> None:
        """Protects the memory of what the updates are given from outside."""
        call, updater = pass_state.step, pass_state.bound_plan.updater
        given = [call.attributes, call.groups, list(call.gradients.values())]
        if updater.state is not updater.seen_state:  # the user has loaded another
            updater.seen_state = updater.state
            given += list(updater.state.values())
        for tensor in pending.tensors_in(given):
            self._streams.keep(tensor, self._updates)

    def zero(self, pass_state: PassState, param: FlatParam) -> Callable[[], None] | None:
        if (
            pass_state.step is None
            or not pass_state.updated[pass_state.bound_plan.last_of[param.order]]
        ):
            return None
        pass_state.step.zeroed.add(param.order)
        with self._streams.use(self._updates):
            param.raw_grad.zero_()
        return partial(self._land, self._mark(self._updates))

    # Landing

    def wait(self, pass_state: PassState, bucket: int, *, updated: bool) -> None:
        if not (pass_state.updated if updated else pass_state.reduced)[bucket]:
            if not pass_state.closed:
                raise read_too_early(pass_state, bucket)
            self.check()
            raise SoonestError(
                f"{place(pass_state.plan, pass_state.number, bucket, local=pass_state.local)} was "
                "read, but has not been sent: restart from a checkpoint"
            )
        flight = self._flights[pass_state]
        mark = (flight.updated if updated else flight.reduced)[bucket]
        if mark is not None:
            self._land(mark)

    def wait_all(self) -> None:
        if self.error is not None:
            self.check()
        for mark in self._last.values():
            self._land(mark)

    def spread(self, used: Iterable[Tensor] = ()) -> None:
        current = self._see_user()
        others = [stream for stream in self._users if stream != current]
        if others:
            self._refuse_graphs()
            now = self._streams.record(current)
            for stream in others:
                self._streams.wait(stream, now)
        for tensor in used:
            self._streams.keep(tensor, current)

    def _land(self, mark: _Mark) -> None:
        self._see_user()
        for stream in self._users:
            self._follow(stream, mark)

    def _follow(self, stream: Stream, mark: _Mark) -> None:
        """Lets a stream wait for a mark, unless it has waited for that or for a later one."""
        way = (stream, mark.stream)
        if self._reached.get(way, -1) < mark.number:
            self._refuse_graphs()
            self._streams.wait(stream, mark.event)
            self._reached[way] = mark.number

    def _mark(self, stream: Stream) -> _Mark:
        before = self._last.get(stream)
        number = 0 if before is None else before.number + 1
        mark = self._last[stream] = _Mark(stream, number, self._streams.record(stream))
        return mark

    def _see_user(self) -> Stream:
        """The current stream, which from now on waits for all that lands."""
        current = self._streams.current()
        if current not in self._users:
            self._users = (*self._users, current)
            for mark in self._last.values():  # some of it may have landed elsewhere already
                self._follow(current, mark)
        return current

    def _wait_for_now(self, stream: Stream) -> None:
        """Lets a stream of the lane wait for all that is enqueued on the user's current one."""
        current = self._see_user()
        self._streams.wait(stream, self._streams.record(current))

    # What may fail

    def check(self) -> None:
        if self.error is None:
            self._refuse_graphs()
        self._enqueued.look()

    def fail(self, error: Exception) -> None:
        self._enqueued.fail(error)

    def _refuse_graphs(self) -> None:
        if self._streams.capturing():
            raise SoonestError(
                "a graph of the device's operations is being captured, and when it runs again "
                "nothing in it would wait for parameters that are still on their way: train "
                "without graphs, or detach() the handle before"
            )

    # The end

    def waits_for(self, limit_s: float) -> str | None:
        self.check()
        return self._drain(limit_s)

    def _drain(self, limit_s: float = math.inf) -> str | None:
        """Lets the host wait until nothing is under way; never in a step of training."""
        if self._updates in self._last:
            self._enqueued.add(self._last[self._updates].event, lambda: "an update")
        return self._enqueued.drain(limit_s)

    def close(self) -> None:
        # Whoever uses this lane again is told what was wrong.
        with suppress(SoonestError):
            self._drain()
        self._pass_state = self._bound_plan = None
        self._memory = []
