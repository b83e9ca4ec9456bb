"""What is in flight on this rank, and how others wait for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from soonest.runtime.engine.partial_grads import PartialGrad, complete, is_partial
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.execute.lane import Lane
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.guard import pending, transforms
from soonest.runtime.guard.module_hooks import ModuleHooks
from soonest.runtime.timing.profiler import Profiler


class InFlight:
    """Holds the parameters and gradients of one bound plan until they have their values.

    Args:
        bound_plan: whose parameters.
        lane: what brings them.
        hooks: needed while parameters are held.
        profiler: notes when each parameter is needed and when it is there.

    Attributes:
        flying: whether anything may be in flight.
        unknown: parameters that got no gradient on this rank, as long as it is not known whether
            another rank had one, and with it whether ``parameter.grad`` is None.
        copies: by order of the parameter, gradients of the user's own that still have to be given
            the reduced values.
    """

    def __init__(
        self, bound_plan: BoundPlan, lane: Lane, hooks: ModuleHooks, profiler: Profiler
    ) -> None:
        transforms.wait_first()
        self._bound_plan = bound_plan
        self.lane = lane
        self._hooks = hooks
        self._profiler = profiler
        self.params = bound_plan.layout.params
        self._parameters = [
            pending.PendingTensor(
                m.parameter, partial(self.wait_param, m), set_grad=partial(self._know, m)
            )
            for m in self.params
        ]
        self._gradients = [self._hold_of(m) for m in self.params]
        self.held: list[pending.PendingTensor | None] = [None] * len(self.params)
        self.copies: dict[int, Tensor] = {}  # by order of the parameter
        self._awaited: set[int] = set()  # buckets
        self._zeroing: dict[int, Callable[[], None]] = {}  # by order of the parameter
        self.flying = False
        self.unknown: set[int] = set()

    def give_up(self) -> list[PartialGrad]:
        """Holds nothing any more, nor keeps any tensor; nothing may be in flight.

        What it kept until the next full garbage collection would seem to be the user's.

        Returns:
            Gradients of which ranks have only their parts, also where this rank does not: all
            ranks have to agree on what there is to complete.
        """
        parts: list[PartialGrad] = []
        for param, held in zip(self.params, self.held, strict=True):
            self._parameters[param.order].release()
            pass_state, param.pass_state = param.pass_state, None  # it leads back to this one
            if pass_state is None or pass_state.whole:
                self._release_gradient(param)
                continue
            if held is not None:
                held.release()
            copy = self.copies.get(param.order)
            parts.append(PartialGrad(param, pass_state, held is not None, copy))
        self._parameters, self._gradients, self.held = [], [], []
        self.copies = {}
        return parts

    def watch(self) -> None:
        """Nothing is in flight, but note when each parameter is needed."""
        if self._profiler.record.closely:
            for param in self.params:
                self.hold(param)

    def hold(self, param: FlatParam) -> None:
        """The parameter is to change; ``param.pass_state`` is what will change it."""
        self._hooks.put()
        self._awaited.add(self._bound_plan.last_of[param.order])
        hold = self._parameters[param.order]
        hold.hides_grad = param.order in self.unknown
        hold.mark_pending()

    def _hold_of(self, param: FlatParam) -> pending.PendingTensor:
        return pending.PendingTensor(param.grad, *self._ways(param, self._zero))

    def _ways(
        self, param: FlatParam, zero: Callable[[FlatParam], None]
    ) -> tuple[partial[None], ...]:
        return partial(self.wait_grad, param), partial(zero, param)

    def _know(self, param: FlatParam) -> None:
        """The user says what its gradient is, whatever other ranks have."""
        self.unknown.discard(param.order)

    def hold_copy(self, param: FlatParam, gradient: Tensor) -> None:
        """The user's own gradient gets the reduced values once they are there."""
        self._hold(param, pending.PendingTensor(gradient, *self._ways(param, self._forget_copy)))
        self.copies[param.order] = gradient

    def _forget_copy(self, param: FlatParam) -> None:
        """The user zeroes a gradient that is still to get its value: it needs none."""
        gradient = self.copies.pop(param.order)
        self.hold_gradient(param, param.grad)  # what is sent is still under way
        with torch.no_grad(), pending.DisableGuard():
            gradient.zero_()

    def hold_gradient(self, param: FlatParam, gradient: Tensor) -> None:
        """This gradient of the parameter is to change or still to be read."""
        before = self.held[param.order]
        if before is not None and before.tensor is gradient:
            return
        if gradient is param.grad:
            self._hold(param, self._gradients[param.order])
        else:
            self._hold(param, pending.PendingTensor(gradient, partial(self.wait_grad, param)))

    def _hold(self, param: FlatParam, hold: pending.PendingTensor) -> None:
        before = self.held[param.order]
        if before is not None:
            before.release()
        self.held[param.order] = hold
        hold.mark_pending()

    def expect(self, pass_state: PassState, gradients: Mapping[int, Tensor | None]) -> None:
        """A step is to change parameters.

        Args:
            pass_state: will do it.
            gradients: that it uses, by order of the parameter.
        """
        for order, gradient in gradients.items():
            param = self.params[order]
            if gradient is not None and order in self.copies:
                self.wait_grad(param)
            param.pass_state = pass_state
            self.hold(param)
            if order not in self.copies:
                self.hold_gradient(param, param.grad if gradient is None else gradient)
        if pass_state.plan.sharded:  # gathering writes to all parameters, if only what is there
            for param in self.params:
                if param.order not in gradients:
                    param.pass_state = pass_state
                    self.hold(param)
        self.flying = True

    def _release_gradient(self, param: FlatParam) -> None:
        held = self.held[param.order]
        if held is not None:
            held.release()
            self.held[param.order] = None
        copy = self.copies.pop(param.order, None)
        if copy is not None:
            with torch.no_grad(), pending.DisableGuard():
                copy.copy_(param.raw_grad)

    def wait_grad(self, param: FlatParam) -> None:
        """Waits until the parameter's gradient has its value, and nothing still reads it."""
        if self.held[param.order] is not None:
            self._wait_for_gradient(param)
            if is_partial(self, param):
                complete(self, param)
            self._release_gradient(param)

    def free(self, param: FlatParam) -> None:
        """Waits until nothing writes to, or still reads, the parameter's gradient."""
        if self.held[param.order] is not None:
            self._wait_for_gradient(param)
            self._release_gradient(param)

    def wait_writable(self, param: FlatParam) -> None:
        """Waits until the parameter's gradient can be written, or added to if it is still there."""
        with pending.DisableGuard():
            added_to = param.parameter.grad is param.grad
            if self.held[param.order] is not None:
                (self.wait_grad if added_to or param.order in self.copies else self.free)(param)
            if added_to or not param.gradient_is_kept:
                return
        self.give_away(param)

    def give_away(self, param: FlatParam) -> None:
        """The gradient in the buffer becomes the user's own; it has its value."""
        self._release_gradient(param)
        self._bound_plan.layout.give_away(param)
        self._gradients[param.order] = self._hold_of(param)

    def wait_param(self, param: FlatParam) -> None:
        """Waits until the parameter has the value that the last ``step()`` gave it."""
        record, pass_state = self._profiler.record, param.pass_state
        needed = record.now()
        if self.flying:
            self._wait(param)
        if record.closely or pass_state is None or pass_state.step is None:
            self._release(param)
        else:
            self._release_bucket(pass_state, self._bound_plan.last_of[param.order])
        if math.isnan(record.needed[param.order]):
            record.needed[param.order] = needed
            record.arrived[param.order] = record.now()

    def _release_bucket(self, pass_state: PassState, bucket: int) -> None:
        """What was updated together lands together: one look at a time costs more."""
        for param in self._bound_plan.awaiting[bucket]:
            if param.pass_state is pass_state:
                self._release(param)
                self._parameters[param.order].release()
        self._awaited.discard(bucket)
        if not self._awaited:
            self._hooks.remove()

    def _release(self, param: FlatParam) -> None:
        if param.order in self.unknown:
            self._resolve(param)
        stepped = param.pass_state is None or param.pass_state.step is not None
        if stepped and param.order not in self._zeroing and not is_partial(self, param):
            self._release_gradient(param)

    def _wait(self, param: FlatParam) -> None:
        pass_state = param.pass_state
        if (
            pass_state is None or pass_state.bound_plan is not self._bound_plan
        ):  # that of another one is over
            return
        if (
            pass_state.step is None and pass_state.plan.sharded
        ):  # ``last_of`` is the last to be shared
            for bucket in self._bound_plan.buckets_of[param.order]:
                self.lane.wait(pass_state, bucket, updated=False)
            return
        last = self._bound_plan.last_of[param.order]
        self.lane.wait(pass_state, last, updated=pass_state.step is not None)

    def _wait_for_gradient(self, param: FlatParam) -> None:
        self._wait(param)
        zeroed = self._zeroing.pop(param.order, None)
        if zeroed is not None:
            zeroed()

    def _resolve(self, param: FlatParam) -> None:
        """Its gradient is reduced: now it shows whether any rank had one."""
        self.unknown.discard(param.order)
        with pending.DisableGuard():
            if param.parameter.grad is None and self._bound_plan.usage.used_anywhere(param):
                param.parameter.grad = param.grad

    def _zero(self, param: FlatParam) -> None:
        """The user zeroes a gradient in flight: that happens when nobody needs it any more."""
        pass_state = param.pass_state
        assert pass_state is not None
        zeroed = self.lane.zero(pass_state, param)
        if zeroed is None:
            self.free(param)
            param.raw_grad.zero_()
        else:
            self._zeroing[param.order] = zeroed

    def all(self) -> None:
        """Everything has arrived: releases it all."""
        for param in self.params:
            if param.order in self.unknown:
                self._resolve(param)
        self.drop(parts=False)
        self.flying = False

    def drop(self, *, parts: bool = True) -> None:
        """Releases everything, whether it has arrived or not.

        Args:
            parts: also gradients of which this rank has only its part.
        """
        for param in self.params:
            self._parameters[param.order].release()
            if parts or not is_partial(self, param):
                self._release_gradient(param)
        self._awaited.clear()
        self._zeroing.clear()
        self._hooks.remove()
