"""Turns what happens in a training loop into progress of the plan.

[Note: life of a gradient]

    autograd accumulates p.grad
          │  post-accumulate hook                                  engine/backward.py   _after
          ▼
    divided by the number of ranks, into its flat buffer           flat/gradients.py    take
          │  the bucket is one gradient nearer to being complete   execute/pass_state.py arrived
          ▼
    an op is issued once its bucket is complete and all ops        execute/thread_lane.py  _issue
    before it are issued: the plan's order, on every rank          execute/bound_plan.py issue
          │                                                        comm/ops.py
          ▼
    reduced: p.grad has the average; who reads it earlier waits    guard/pending.py
          │  optimizer.step() was called, perhaps long before
          ▼
    the bucket's parameters are updated by the user's optimizer    optim/bucket_update.py apply
          │
          ▼
    the next forward pass enters the layer: its module's pre-hook, or the first read of a parameter,
    waits for this bucket and for nothing else                     engine/in_flight.py  wait_param

``optimizer.step()`` itself only notes the settings of that moment and returns. What a bucket still
lacks arrives while the next forward pass computes the layers before. With ``shard_optimizer`` the
reduction leaves each rank its part, which it updates, and the parts of parameters are gathered by
one more op of the plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.core.plan import Plan
from soonest.errors import SoonestError
from soonest.runtime.comm import Ranks, Wire
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.engine import model_changes
from soonest.runtime.engine.backward import Backward
from soonest.runtime.engine.in_flight import InFlight
from soonest.runtime.engine.module_buffers import Buffers
from soonest.runtime.engine.new_params import Newcomers
from soonest.runtime.engine.partial_grads import hold_parts
from soonest.runtime.engine.step import step
from soonest.runtime.engine.structure import Structure
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.execute.lane import Lane
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.bystanders import Aliases
from soonest.runtime.flat.gradients import Gradients
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.guard import compiled, modes, pending
from soonest.runtime.guard.hooks import Calling, noop
from soonest.runtime.guard.module_hooks import ModuleHooks
from soonest.runtime.optim import grad_norm, patch
from soonest.runtime.optim.bucket_update import Updater
from soonest.runtime.optim.state import OptimizerState
from soonest.runtime.timing.profiler import Profiler
from soonest.runtime.validate import wrappers

_log = logging.getLogger(__name__)


class Engine:
    """The main thread's side of one prioritized model.

    Args:
        model, optimizer: the user's own; both are changed in place.
        separable: whether updates may run one bucket at a time.
        layout, plan: to begin with.
        ranks: over which to reduce.
        lane: what executes the plan.
        sharing: over which to shard the optimizer's state, if the plan shards.
        wire: how things are sent.
        failures: who the ranks are.
        after_step: called at the end of each ``step()`` that used reduced gradients; on every
            rank after the same steps.
        buffers: to be sent around after each backward pass, if there are any.
        newcomers: looks out for parameters that come to be trained; None if they are left alone.
        anew: called with those that have come, to admit them and to plan and bind anew.

    Attributes:
        backward: the model's backward passes.
        after_backward: called at the end of each that was synchronized, with the parameters it gave
            nothing.
        profiler: keeps the records of steps.
        settled: the plan stays.
        history: how plans have changed so far, and why, one sentence each.
        inputs: shapes and dtypes of the tensors that the first forward pass was given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        separable: bool,
        layout: FlatBuffers,
        plan: Plan,
        ranks: Ranks,
        lane: Lane,
        sharing: Ranks | None,
        wire: Wire,
        failures: FailureReporter,
        after_step: Callable[[Engine], None],
        buffers: Buffers | None = None,
        newcomers: Newcomers | None = None,
        anew: Callable[[Engine, Sequence[nn.Parameter]], None] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.lane = lane
        self._wire = wire
        self.failures = failures
        self.separable = separable
        self.cls = type(optimizer)
        self.state = OptimizerState(optimizer, self.cls, sharing, wire, failures)
        self.after_step = after_step
        self.buffers = buffers
        self.newcomers = newcomers
        self.anew = anew
        self.profiler = Profiler(type(model).__name__, len(layout.params), lane.clock)
        self.backward = Backward(lane, failures, self.profiler, self._backward_ended)
        self.after_backward: Callable[[Engine, Sequence[FlatParam]], None] = noop
        self.structure = Structure(model)
        self.entries = compiled.Entries(model)
        self.module_hooks = ModuleHooks(self.entries.outside())
        self.aliases = Aliases()
        self.settled = False
        self.history: list[str] = []
        self.inputs: list[str] = []
        patch.take_over(optimizer, self, self.state)
        self._bind(layout, plan)
        self.model_hooks = [
            model.register_forward_pre_hook(Calling(self.forward_begins), with_kwargs=True),
            model.register_forward_hook(Calling(self.forward_ends)),
        ]

    def bind(self, layout: FlatBuffers, plan: Plan) -> None:
        """From now on, run this plan on these buffers. Nothing may be in flight."""
        parts = self.in_flight.give_up()
        self.bound_plan.unfinished.clear()
        self._bind(layout, plan)
        hold_parts(self.in_flight, parts)

    def _bind(self, layout: FlatBuffers, plan: Plan) -> None:
        self.layout = layout
        self.updater = Updater(self.optimizer, self.cls, layout.params)
        self.state.bind(layout, plan)
        self.bound_plan = BoundPlan(
            plan, layout, self.ranks, self.updater, state=self.state.parts, wire=self._wire
        )
        self.profiler.bind(plan, layout.params)
        self.gradients = Gradients(layout, self.ranks.group.size(), self.failures)
        layout.note_memory()
        self.in_flight = InFlight(self.bound_plan, self.lane, self.module_hooks, self.profiler)
        newcomers = self.newcomers.look(layout.params) if self.newcomers is not None else ()
        self.backward.bind(self.bound_plan, self.in_flight, self.gradients, newcomers)
        self.in_flight.watch()
        _log.debug(
            "the plan is now %s: %d buckets, %d ops",
            plan.fingerprint,
            len(plan.buckets),
            len(plan.ops),
        )

    def watch(self) -> None:
        """Takes note of when each parameter is needed, though nothing is in flight."""
        self.in_flight.watch()

    # In the forward pass

    def forward_begins(self, *inputs: Any) -> None:
        self.lane.enter()
        try:
            wrappers.check_caller()
        except ValueError as error:
            raise self.failures.at_fault(error) from None
        self.backward.forward_begins()
        model_changes.follow(self)
        if self.structure.has_changed():
            model_changes.restructure(self)
        if self.buffers is not None:
            self.buffers.forward_begins(self.backward.passes)
        if self.profiler.observing:  # what was read before it does not show the order of use
            self.inputs = [f"{tuple(x.shape)} {x.dtype}" for x in pending.tensors_in(inputs)]
            self.profiler.record = self.profiler.new_record()
            self.in_flight.watch()
        if self.entries.outdated():
            model_changes.renew_modules(self)
        if self.entries.whole or modes.is_compiling():
            self.wait_for_all()

    def forward_ends(self, inputs: Any = None, output: Any = None, *_: Any) -> None:
        self.profiler.forward_ended()
        if self.buffers is not None:
            reduced = torch.is_grad_enabled() and self.backward.synchronizing
            self.buffers.forward_ended(synchronizing=reduced)
        if torch.is_grad_enabled() and modes.is_plain():
            self.backward.expect(output)

    def wait_for_all(self) -> None:
        """Also what has arrived and is only watched."""
        self.flush()
        if not self.backward.under_way:
            self.in_flight.all()

    # After the backward pass

    def _backward_ended(self, late: Sequence[FlatParam]) -> None:
        self._share_buffers(active=True)
        if self.structure.has_changed():  # since the forward pass, or without one of the model
            model_changes.restructure(self)
        elif self.newcomers is not None and (parameters := self.newcomers.come()):
            model_changes.take_in(self, parameters)
        self.after_backward(self, late)
        if modes.is_compiling():  # what follows is compiled, too, and should find plain tensors
            self.flush()

    def contribute_nothing(self) -> None:
        """Takes part in a backward pass that only others have."""
        self.backward.contribute_nothing()
        self._share_buffers(active=False)

    def _share_buffers(self, *, active: bool) -> None:
        if self.buffers is not None:
            uneven = self.backward.uneven is not None and self.backward.uneven.enabled
            self.buffers.share(self.backward.passes - 1, active=active if uneven else None)

    # The optimizer

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """What the user's ``optimizer.step(closure)`` does."""
        return step(self, closure)

    def groups_changed(self) -> None:
        """The optimizer has other parameter groups."""
        model_changes.regroup(self)

    def clear_gradients(self) -> None:
        """What ``optimizer.zero_grad()`` does: those in flight go on without their names."""
        self.in_flight.unknown.clear()
        patch.clear(self.optimizer)

    # The handle

    @property
    def late(self) -> str | None:
        """Which rank is late, and why, in a sentence; None if none is, or nobody knows."""
        lateness = self.backward.lateness
        return lateness.late if lateness is not None else None

    @property
    def who_is_late(self) -> str:
        """The same in any case."""
        lateness = self.backward.lateness
        return lateness.told if lateness is not None else "which rank is late is not known here"

    def flush(self) -> None:
        """Waits until nothing is in flight: every parameter and gradient has its value."""
        self.lane.check()
        if self.in_flight.flying:
            self.lane.wait_all()
            self.lane.check()  # what has failed meanwhile is no longer waited for
            if not self.backward.under_way:
                self.in_flight.all()

    def complete(self) -> None:
        """Makes every gradient whole again where ranks have parts of it; a collective call."""
        self.lane.wait_all()
        latest = self.backward.latest
        if latest is not None and not latest.whole:
            self.bound_plan.gather_gradients(latest)
            self.in_flight.all()
        self.flush()

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error: bool) -> Tensor:
        """Clips this rank's parts of the gradients by the norm of all; a collective call."""
        assert self.state.parts is not None
        self.lane.wait_all()
        pass_state = self.backward.latest
        if pass_state is None or pass_state.step is not None:
            raise SoonestError(
                "there are no gradients to clip: call clip_grad_norm_ between backward() and step()"
            )
        with pending.DisableGuard():
            gradients = self.bound_plan.parts_with_gradient(pass_state)
            device = self.layout.grads[0].device
            return grad_norm.clip(
                self.state.parts, gradients, max_norm, norm_type, error, device=device
            )
