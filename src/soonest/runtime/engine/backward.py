"""Backward passes: each gradient is reduced as soon as it is ready, in the order of the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.engine.gradient_hooks import GradientHooks
from soonest.runtime.engine.in_flight import InFlight
from soonest.runtime.engine.partial_grads import complete_kept
from soonest.runtime.engine.pass_errors import repeated, unfinished
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.execute.lane import Lane
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.flat.gradients import Gradients
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.flat.storage import has_alias
from soonest.runtime.guard import pending
from soonest.runtime.guard.accumulation import InnerPasses
from soonest.runtime.guard.hooks import weak_hook
from soonest.runtime.timing.lateness import Lateness
from soonest.runtime.timing.profiler import Profiler

if TYPE_CHECKING:
    from soonest.runtime.engine.join import Uneven


class Backward:
    """The backward passes of one prioritized model.

    Args:
        lane: executes the passes.
        failures: who the ranks are.
        profiler: keeps their records.
        ended: called at the end of each that was synchronized, with the parameters it gave nothing.

    Attributes:
        siblings: the same of other parameters of the same model: a pass synchronizes all.
        lateness: compares this rank's passes with those of the others, where that is known.
        uneven: what to do when others have no more input, while that may be.
        everyone: all ranks took part in the last one that was synchronized.
        hooks: see the gradients come.
        synchronizing: gradients are reduced, instead of only being accumulated here.
        passes: how many have been synchronized, or are being so.
        latest: the last of those.
    """

    def __init__(
        self,
        lane: Lane,
        failures: FailureReporter,
        profiler: Profiler,
        ended: Callable[[Sequence[FlatParam]], None],
    ) -> None:
        self._lane = lane
        self._failures = failures
        self._profiler = profiler
        self._ended = ended
        self.siblings: list[Backward] = []
        self.lateness: Lateness | None = None
        self.uneven: Uneven | None = None
        self.everyone = True
        self.synchronizing = True
        self.passes = 0
        self.latest: PassState | None = None
        self._looked_at: PassState | None = None
        self._open: PassState | None = None
        self._accumulated: set[int] = set()  # ids of parameters that a pass under no_sync has used
        self._ends_with_all = False
        self._inner = InnerPasses()
        self.hooks = GradientHooks(self._before, self._after, self._newcomer)

    def bind(
        self,
        bound_plan: BoundPlan,
        in_flight: InFlight,
        gradients: Gradients,
        newcomers: Sequence[nn.Parameter],
    ) -> None:
        """From now on, passes share the gradients of this plan's parameters.

        Args:
            bound_plan: what each pass executes.
            in_flight: holds what is in flight.
            gradients: of the parameters.
            newcomers: other parameters that may come to be trained.
        """
        self._bound_plan, self._in_flight, self._gradients = bound_plan, in_flight, gradients
        self._params = bound_plan.layout.params
        self.latest = None
        self._fresh = bytearray(len(self._params))
        self._aliased: list[FlatParam] = []
        for param in self._params:
            param.pass_state = None
        self.hooks.bind(self._params, newcomers)

    @property
    def under_way(self) -> bool:
        """Whether one has begun and not ended."""
        return self._open is not None

    def check(self) -> None:
        """Raises SoonestError if one has begun and not ended: then it never will."""
        if self._open is not None:
            raise self._failures.at_fault(unfinished(self._open, self._params))

    # From begin to end

    def forward_begins(self) -> None:
        """A new graph is made; an earlier pass through the whole model may have raised."""
        self._ends_with_all = False
        self.hooks.look_out()

    def expect(self, output: Any) -> None:
        """A pass through the whole model may begin at this output of it."""
        for tensor in pending.tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(weak_hook(self._begins_with_all))

    def _begins_with_all(self, _: Tensor) -> None:
        """Its end is that of the whole pass, not of a checkpoint's inside it."""
        if not self._ends_with_all:
            self._ends_with_all = True
            self._inner.begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._ends)

    def _ends(self) -> None:
        self._ends_with_all = False
        for backward in (self, *self.siblings):
            if backward._open is not None:
                backward._close(backward._open)

    def _before(self, order: int, _: Any) -> None:
        """A gradient is about to be written where another may still be in flight."""
        param = self._params[order]
        if self._open is not None and not math.isnan(self._open.record.ready[order]):
            again = repeated(param) if self._inner.here() else unfinished(self._open, self._params)
            raise self._failures.at_fault(again)
        if self._open is None and self._looked_at is not self.latest:
            self._look_at_kept()
        if order in self._in_flight.unknown:
            pending.wait_for(param.parameter)  # what is added to must be known
        self._in_flight.wait_writable(param)
        with pending.DisableGuard():
            gradient = param.parameter.grad
            self._fresh[order] = gradient is None
            if gradient is not None and gradient is not param.grad:
                self._gradients.check_own(param, gradient)

    def _look_at_kept(self) -> None:
        """A pass begins, before anything is written to the buffers."""
        self._looked_at = latest = self.latest
        if latest is not None and latest.step is None and not latest.whole:
            complete_kept(self._in_flight)

    def _after(self, order: int, *_: Any) -> None:
        """A gradient has been written to ``parameter.grad``."""
        param = self._params[order]
        pass_state = self._pass_state()
        if pass_state is None:
            self._accumulated.add(id(param.parameter))
            return
        if param.parameter.grad is None:  # the graph led here, but with an undefined one
            return
        if not self._inner.must_wait(param.parameter):
            self._contribute(pass_state, param, fresh=bool(self._fresh[order]))

    def _newcomer(self, *_: Any) -> None:
        """A parameter has a gradient that is not a parameter yet: the end of this pass shows it."""
        self._pass_state()

    def _pass_state(self) -> PassState | None:
        """What reduces the gradients of this pass, if they are to be."""
        if not self.synchronizing:
            return None
        if self._open is None:
            self._begin()
            if not self._ends_with_all:
                self._inner.begin()
                torch.autograd.Variable._execution_engine.queue_callback(self._ends)
        return self._open

    def _begin(self, *, active: bool = True) -> PassState:
        """The first gradient of a pass that is to be synchronized.

        Args:
            active: it is one of this rank.
        """
        self._lane.check()
        self.everyone = self.uneven is None or (active and self.uneven.all_are_active())
        pass_state = PassState(self.passes, self._bound_plan, self._profiler.backward_begins())
        self.passes += 1
        self._open = self.latest = pass_state
        self._in_flight.flying = True
        self._lane.begin(pass_state)
        if self.lateness is not None:
            self.lateness.begins()
        for sibling in self.siblings:
            if sibling._open is None:
                sibling._begin()
        return pass_state

    def _contribute(self, pass_state: PassState, param: FlatParam, *, fresh: bool = False) -> None:
        copy = self._gradients.take(param, fresh=fresh)
        if copy is None:
            self._in_flight.hold_gradient(param, param.grad)
        else:
            if not fresh and has_alias(copy):
                self._aliased.append(param)
            self._in_flight.hold_copy(param, copy)
        self._arrived(pass_state, param)

    def _lack(self, pass_state: PassState, param: FlatParam) -> None:
        """Contributes zeros in the place of a gradient."""
        param.raw_grad.zero_()
        pass_state.unused.add(param.order)
        self._in_flight.hold_gradient(param, param.grad)
        self._arrived(pass_state, param)

    def _arrived(self, pass_state: PassState, param: FlatParam) -> None:
        param.pass_state = pass_state
        pass_state.record.ready[param.order] = pass_state.record.now()
        buckets = self._bound_plan.buckets_of[param.order]
        self._lane.ready(pass_state, buckets)
        if pass_state.arrived(buckets):
            self._lane.advance()

    def _close(self, pass_state: PassState) -> None:
        """The pass is over: who got no gradient contributes what it has, or zeros."""
        ready, waited = pass_state.record.ready, self._inner.end()
        late = [param for param in self._params if math.isnan(ready[param.order])]
        for param in late:
            self._in_flight.wait_writable(param)
            if id(param.parameter) in waited:
                self._contribute(pass_state, param)
                continue
            if param.parameter.grad is not None:  # without a name, which would count as the user's
                if id(param.parameter) not in self._accumulated:
                    pass_state.kept[param.order] = param.parameter.grad.detach().clone()
                self._contribute(pass_state, param)
                continue
            self._in_flight.unknown.add(param.order)
            self._lack(pass_state, param)
            self._in_flight.hold(param)
        self._closed(pass_state)
        self._ended([param for param in late if id(param.parameter) not in waited])

    def _closed(self, pass_state: PassState) -> None:
        pass_state.record.backward_ended = pass_state.record.now()
        pass_state.closed = True
        self._open = None
        self._accumulated.clear()
        self._lane.advance()
        if pass_state.bound_plan.state is not None:
            pass_state.bound_plan.state.count_users(pass_state)
        if self.lateness is not None:
            self.lateness.ends()
        aliased, self._aliased = self._aliased, []
        for param in aliased:  # nobody can make those wait that lie over the same memory
            self._in_flight.wait_grad(param)

    def contribute_nothing(self) -> None:
        """Takes part in a pass that only others have: no gradient changes here."""
        pass_state = self._begin(active=False)
        for param in self._params:
            pending.wait_for(param.parameter)
            self._in_flight.wait_writable(param)
            if param.parameter.grad is param.grad:
                self._in_flight.give_away(param)
            self._lack(pass_state, param)
        self._closed(pass_state)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this context, passes only accumulate gradients here."""
        before = self.synchronizing
        together = (self, *self.siblings)
        for backward in together:
            backward.synchronizing = False
        try:
            yield
        finally:
            for backward in together:
                backward.synchronizing = before

    def detach(self) -> None:
        """Passes are the user's own again."""
        self.hooks.remove()
        for sibling in self.siblings:
            sibling.siblings.remove(self)
