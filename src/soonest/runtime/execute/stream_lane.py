"""The lane for devices with streams: no thread, and the host never waits.

Everything is enqueued by the training loop itself: ops by its hooks, in plan order, as gradients
are produced, and all updates by ``optimizer.step()``, what the forward pass needs first in front.
Two streams run them side by side, for when updates come, all ops of the backward pass are enqueued
already, and the first update must not wait for the last op. Events order the two, and the streams
on which the user computes:

- an op waits for the streams that produced its gradients;
- an update waits for its bucket's op, and for all that the user had enqueued before ``step()``;
- whoever reads or overwrites a tensor in flight waits for the op or update that it is in.

So to wait for a tensor is to let streams wait: the current one, and all others that the user has
been seen to compute on, as a tensor is no longer guarded once somebody has waited for it.

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

import torch
from torch import Tensor

from soonest.core.plan import GATHER_PARAMETERS
from soonest.errors import SoonestError
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.comm.signals import is_from_handler
from soonest.runtime.device.clock import DeviceClock
from soonest.runtime.device.streams import Event, Stream, Streams
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.execute.lane import read_too_early
from soonest.runtime.execute.lane_failure import LaneFailure
from soonest.runtime.execute.pass_state import (
    GATHERED,
    REDUCED,
    UPDATED,
    BucketState,
    PassState,
    place,
)
from soonest.runtime.execute.stream_order import Mark, StreamOrder
from soonest.runtime.execute.watchdog import Enqueued
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.guard import modes, pending
from soonest.runtime.timing.spans import of_bucket, of_op, span


class _Flight:
    """How far a pass is on the streams of the device, which run behind the host.

    Args:
        buckets: how many.

    Attributes:
        producers: per bucket, the streams on which its gradients are produced.
        marks: per state and bucket, the point at which the device gets the bucket there; None
            before that is enqueued, and where nothing needs to be waited for. The host's own
            ``PassState.states`` says only what is enqueued.
        stepped: the updates have been enqueued.
    """

    def __init__(self, buckets: int) -> None:
        self.producers: list[dict[Stream, None]] = [{} for _ in range(buckets)]
        self.marks: dict[BucketState, list[Mark | None]] = {
            state: [None] * buckets for state in (REDUCED, UPDATED, GATHERED)
        }
        self.stepped = False


class StreamLane:
    """The lane of a device with streams: it enqueues ops on one stream and updates on another.

    Args:
        streams: of the device.
        timeout_s: how long nothing may come to an end that has been enqueued, seconds.
        failures: asks the other ranks who is at fault, and tells them what is wrong here.
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
        self._order = StreamOrder(streams)
        self._failure = LaneFailure(failures, self._drop)
        self._enqueued = Enqueued(timeout_s=timeout_s, failure=self._failure, broken=broken)
        self._ops, self._updates = streams.make(), streams.make()
        # Neither keeps alive a training that nobody refers to any more; only its memory, while the
        # device may still use that.
        self._pass_state: weakref.ref[PassState] | None = None
        self._bound_plan: weakref.ref[BoundPlan] | None = None
        self._memory: list[Tensor] = []
        self._flights: weakref.WeakKeyDictionary[PassState, _Flight] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        pass_state = self._pass_state() if self._pass_state is not None else None
        return f"<StreamLane: {pass_state or 'no pass'}, {self._enqueued!r}>"

    @property
    def error(self) -> SoonestError | None:
        return self._failure.error

    def begin(self, pass_state: PassState) -> None:
        self._order.see_user()
        if self._pass_state is not None and (earlier := self._pass_state()) is not None:
            earlier.superseded = True
        if self._bound_plan is None or self._bound_plan() is not pass_state.bound_plan:
            self._drain()
            self._bound_plan = weakref.ref(pass_state.bound_plan)
            self._memory = pass_state.bound_plan.memory()
        self._pass_state = weakref.ref(pass_state)
        self._flights[pass_state] = _Flight(len(pass_state.plan.buckets))

    def enter(self) -> None:
        self._order.refuse_graphs()

    def ready(self, pass_state: PassState, buckets: Sequence[int]) -> None:
        producer = self._order.see_user()
        flight = self._flights[pass_state]
        for bucket in buckets:
            flight.producers[bucket][producer] = None

    def advance(self) -> None:
        pass_state = self._pass_state() if self._pass_state is not None else None
        if pass_state is None or self.error is not None:
            return
        # Pending tensors wait when they are used, but what is used here is what they wait for.
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
            if (updated := flight.marks[UPDATED][bucket]) is not None:
                self._order.follow(self._ops, updated)
            mark = self._run_op(pass_state, op)
            if pass_state.plan.ops[op].kind == GATHER_PARAMETERS:
                flight.marks[GATHERED][bucket] = mark
            elif op in pass_state.plan.reduces:
                flight.marks[REDUCED][bucket] = mark

    def _run_op(self, pass_state: PassState, op: int) -> Mark:
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
                raise self._failure.fail(SoonestError(f"{what()} was not sent: {error}")) from error
            except RuntimeError as error:
                if is_from_handler(error):
                    self._failure.fail(SoonestError(f"{what()} was interrupted: {error}"))
                    raise
                raise self._failure.not_reduced(what(), error) from error
            pass_state.record.op_ended(op)
            pass_state.issue_op()
            pass_state.bound_plan.complete_op(pass_state)
        mark = self._order.mark(self._ops)
        self._enqueued.add(mark.event, what)
        return mark

    # Updates

    def _enqueue_updates(self, pass_state: PassState, flight: _Flight) -> None:
        """Enqueues all updates, what the forward pass needs first in front.

        In the order of ops, what is needed first would often be the last.
        """
        self._order.follow_user(self._updates)
        self._keep(pass_state)
        with self._streams.use(self._updates), modes.usual():
            for bucket in pass_state.bound_plan.by_need:
                if (reduced := flight.marks[REDUCED][bucket]) is not None:
                    self._order.follow(self._updates, reduced)
                pass_state.record.update_started(bucket)
                try:
                    with span(of_bucket, "update", pass_state.plan, bucket):
                        pass_state.bound_plan.update(pass_state, bucket)
                except Exception as error:
                    raise self._failure.fail(error) from error
                pass_state.record.update_ended(bucket)
                pass_state.bound_plan.complete_update(pass_state, bucket)
                flight.marks[UPDATED][bucket] = self._order.mark(self._updates)

    def _keep(self, pass_state: PassState) -> None:
        """Keeps the memory of what the updates are given from outside until they have run."""
        call, updater = pass_state.step, pass_state.bound_plan.updater
        given = [call.attributes, call.groups, list(call.gradients.values())]
        if updater.state is not updater.seen_state:  # the user has loaded another
            updater.seen_state = updater.state
            given += list(updater.state.values())
        for tensor in pending.tensors_in(given):
            self._streams.keep(tensor, self._updates)

    def zero(self, pass_state: PassState, param: FlatParam) -> Callable[[], None] | None:
        last = pass_state.bound_plan.last_of[param.order]
        if pass_state.step is None or pass_state.states[last] < pass_state.final:
            return None
        pass_state.step.zeroed.add(param.order)
        with self._streams.use(self._updates):
            param.raw_grad.zero_()
        return partial(self._order.users_follow, self._order.mark(self._updates))

    # Waiting

    def wait(self, pass_state: PassState, bucket: int, *, updated: bool) -> None:
        enough = pass_state.final if updated else REDUCED
        if pass_state.states[bucket] < enough:
            if not pass_state.closed:
                raise read_too_early(pass_state, bucket)
            self.check()
            raise SoonestError(
                f"{pass_state.place(bucket)} was read, but has not been sent: restart from a "
                "checkpoint"
            )
        if (mark := self._flights[pass_state].marks[enough][bucket]) is not None:
            self._order.users_follow(mark)

    def wait_all(self) -> None:
        if self.error is not None:
            self.check()
        self._order.users_follow_all()

    def spread(self, used: Iterable[Tensor] = ()) -> None:
        self._order.spread(used)

    # What may fail

    def check(self) -> None:
        if self.error is None:
            self._order.refuse_graphs()
        self._enqueued.look()

    def fail(self, error: Exception) -> None:
        self._failure.fail(error)

    def _drop(self) -> None:
        self._enqueued.clear()

    # The end

    def waits_for(self, limit_s: float) -> str | None:
        self.check()
        return self._drain(limit_s)

    def _drain(self, limit_s: float = math.inf) -> str | None:
        """Lets the host wait until nothing is under way; never in a step of training."""
        if (last := self._order.last(self._updates)) is not None:
            self._enqueued.add(last.event, lambda: "an update")
        return self._enqueued.drain(limit_s)

    def close(self) -> None:
        # Whoever uses this lane again is told what was wrong.
        with suppress(SoonestError):
            self._drain()
        self._pass_state = self._bound_plan = None
        self._memory = []
