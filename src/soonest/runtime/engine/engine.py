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
from soonest.errors import PeerLostError, SoonestError
from soonest.runtime.comm import Ranks, Wire
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.engine.backward import Backward
from soonest.runtime.engine.in_flight import InFlight
from soonest.runtime.engine.module_buffers import Buffers
from soonest.runtime.engine.new_params import Newcomers
from soonest.runtime.engine.structure import Structure
from soonest.runtime.engine.undone import undone
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.execute.lane import Lane
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.flat.buffers import FlatBuffers, FlatParam
from soonest.runtime.flat.bystanders import Aliases
from soonest.runtime.flat.gradients import Gradients
from soonest.runtime.guard import compiled, modes, pending
from soonest.runtime.guard.hooks import Calling, noop
from soonest.runtime.optim import patch
from soonest.runtime.optim.bucket_update import Updater, raw_step
from soonest.runtime.optim.state import OptimizerState
from soonest.runtime.timing.profiler import Profiler
from soonest.runtime.validate import checks, wrappers

_log = logging.getLogger(__name__)


class Engine:
    """The main thread's side of one prioritized model.

    Args:
        model, optimizer: the user's own; both are changed in place.
        separable: whether updates may run one bucket at a time.
        layout, plan: to begin with.
        ranks: over which to combine.
        lane: what executes the plan.
        sharing: over which to share out the optimizer's state, if the plan shards.
        wire: how things are sent.
        failures: who the ranks are.
        after_step: called at the end of each ``step()`` that used combined gradients; on every
            rank after the same steps.
        buffers: to be sent around after each backward pass, if there are any.
        newcomers: looks out for parameters that come to be trained; None if they are left alone.
        anew: called with those that have come, to admit them and to plan and bind anew.

    Attributes:
        backward: the model's backward passes.
        after_backward: called at the end of each that was combined, with the parameters it gave
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
        self._failures = failures
        self._separable = separable
        self._cls = type(optimizer)
        self.state = OptimizerState(optimizer, self._cls, sharing, wire, failures)
        self._after_step = after_step
        self._buffers = buffers
        self._newcomers = newcomers
        self._anew = anew
        self.profiler = Profiler(type(model).__name__, len(layout.params), lane.clock)
        self.backward = Backward(lane, failures, self.profiler, self._backward_ended)
        self.after_backward: Callable[[Engine, Sequence[FlatParam]], None] = noop
        self._structure = Structure(model)
        self._entries = compiled.Entries(model)
        self._module_hooks = pending.ModuleHooks(self._entries.outside())
        self._aliases = Aliases()
        self.settled = False
        self.history: list[str] = []
        self.inputs: list[str] = []
        patch.take_over(optimizer, self, self.state)
        self._bind(layout, plan)
        self._model_hooks = [
            model.register_forward_pre_hook(Calling(self.forward_begins), with_kwargs=True),
            model.register_forward_hook(Calling(self.forward_ends)),
        ]

    def bind(self, layout: FlatBuffers, plan: Plan) -> None:
        """From now on, run this plan on these buffers. Nothing may be in flight."""
        parts = self._in_flight.give_up()
        self.bound_plan.unfinished.clear()
        self._bind(layout, plan)
        self._in_flight.hold_parts(parts)

    def _bind(self, layout: FlatBuffers, plan: Plan) -> None:
        self.layout = layout
        self._updater = Updater(self.optimizer, self._cls, layout.params)
        self.state.bind(layout, plan)
        self.bound_plan = BoundPlan(
            plan, layout, self.ranks, self._updater, state=self.state.parts, wire=self._wire
        )
        self.profiler.bind(plan, layout.params)
        self.gradients = Gradients(layout, self.ranks.group.size(), self._failures)
        layout.note_memory()
        self._in_flight = InFlight(self.bound_plan, self.lane, self._module_hooks, self.profiler)
        newcomers = self._newcomers.look(layout.params) if self._newcomers is not None else ()
        self.backward.bind(self.bound_plan, self._in_flight, self.gradients, newcomers)
        self._in_flight.watch()
        _log.debug(
            "the plan is now %s: %d buckets, %d ops",
            plan.fingerprint,
            len(plan.buckets),
            len(plan.ops),
        )

    def watch(self) -> None:
        """Takes note of when each parameter is needed, though nothing is in flight."""
        self._in_flight.watch()

    # In the forward pass

    def forward_begins(self, *inputs: Any) -> None:
        self.lane.enter()
        try:
            wrappers.check_caller()
        except ValueError as error:
            raise self._failures.at_fault(error) from None
        self.backward.forward_begins()
        self._follow()
        if self._structure.has_changed():
            self._restructure()
        if self._buffers is not None:
            self._buffers.forward_begins(self.backward.passes)
        if self.profiler.observing:  # what was read before it does not show the order of use
            self.inputs = [f"{tuple(x.shape)} {x.dtype}" for x in pending.tensors_in(inputs)]
            self.profiler.record = self.profiler.new_record()
            self._in_flight.watch()
        if self._entries.outdated():
            self._look_at_modules()
        if self._entries.whole or modes.is_compiling():
            self._land_all()

    def forward_ends(self, inputs: Any = None, output: Any = None, *_: Any) -> None:
        self.profiler.forward_ended()
        if self._buffers is not None:
            combined = torch.is_grad_enabled() and self.backward.synchronizing
            self._buffers.forward_ended(synchronizing=combined)
        if torch.is_grad_enabled() and modes.is_plain():
            self.backward.expect(output)

    def _follow(self) -> None:
        """Parameters that the user has given other memory are updated there from now on."""
        with pending.DisableGuard():
            moved = [param for param in self.layout.params if param.has_moved]
            if not moved:
                return
            try:
                _log.debug("new memory: %s", ", ".join(param.name for param in moved))
                self.layout.follow(moved)
                if self.state.parts is not None:
                    if self.layout.overlaps:
                        raise SoonestError(checks.OVERLAP)
                    self.state.parts.follow(moved)
            except SoonestError as error:
                raise self._failures.at_fault(error) from None
        for param in moved:
            self.backward.renew_hooks(param)

    def _look_at_modules(self) -> None:
        """The model has come to have other modules, or compiled ones."""
        _log.debug("the model has other modules than before")
        self._land_all()
        self._entries.renew()
        self._module_hooks.move_to(self._entries.outside())

    def _restructure(self) -> None:
        """The model has other modules or parameters now; a collective call.

        What ``DistributedDataParallel`` would do if it were made anew: every rank gets the first
        one's new parameters, and its buffers.
        """
        self._look_at_modules()
        self._structure.look()
        if self._newcomers is None:
            return
        try:
            wrappers.check_outside(self.model)
            checks.check_model(self.model, self.layout.without)
        except ValueError as error:
            raise self._failures.at_fault(error) from None
        self._newcomers.look(self.layout.params)
        present = {id(parameter) for parameter in self.model.parameters()}
        come = self._newcomers.come()
        if come or any(id(param.parameter) not in present for param in self.layout.params):
            self._take_in(come)
        if self._buffers is not None:
            self._buffers.anew()

    def _land_all(self) -> None:
        """Also what has arrived and is only watched."""
        self.flush()
        if not self.backward.under_way:
            self._in_flight.all()

    # After the backward pass

    def _backward_ended(self, late: Sequence[FlatParam]) -> None:
        self._share_buffers(active=True)
        if self._structure.has_changed():  # since the forward pass, or without one of the model
            self._restructure()
        elif self._newcomers is not None and (parameters := self._newcomers.come()):
            self._take_in(parameters)
        self.after_backward(self, late)
        if modes.is_compiling():  # what follows is compiled, too, and should find plain tensors
            self.flush()

    def contribute_nothing(self) -> None:
        """Takes part in a backward pass that only others have."""
        self.backward.contribute_nothing()
        self._share_buffers(active=False)

    def _share_buffers(self, *, active: bool) -> None:
        if self._buffers is not None:
            uneven = self.backward.uneven is not None and self.backward.uneven.enabled
            self._buffers.share(self.backward.passes - 1, active=active if uneven else None)

    def _take_in(self, parameters: Sequence[nn.Parameter]) -> None:
        """Trains these, too, from now on; a collective call."""
        assert self._anew is not None
        _log.debug("%d more parameters are trained now", len(parameters))
        self.complete()
        self._look_at_modules()
        self.profiler.observing = True
        self._anew(self, parameters)
        self.state.adopt()

    # The optimizer

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """What the user's ``optimizer.step(closure)`` does."""
        if modes.is_compiling() and self._updater.owned:
            raise self._failures.at_fault(
                ValueError(
                    "optimizer.step() is called from code that torch.compile compiles, and soonest "
                    "would round updates otherwise than that: call it outside, and leave out "
                    "torch.compile(optimizer.step)"
                )
            )
        self.lane.check()
        self.backward.check()
        if self._updater.outdated():
            self.groups_changed()
        self._follow()
        blocking = self.bound_plan.plan.blocking
        others = self._updater.trains_others()
        if others and self._newcomers is not None and (come := self._newcomers.come()):
            self._take_in(come)  # the backward pass was none of the model's parameters so far
            others = self._updater.trains_others()
        if others and self.state.parts is not None:
            raise self._failures.at_fault(
                SoonestError(
                    "the optimizer has a gradient of a parameter that is frozen or no longer in "
                    "the model, and under shard_optimizer=True that is nobody's to update: set its "
                    "grad to None, or take it out of the optimizer"
                )
            )
        whole = self.state.parts is None and (blocking or self.layout.overlaps or others)
        if self._separable and not whole:
            loss = self._step_by_bucket(closure)
            if blocking:
                self.flush()
                self._in_flight.watch()
        else:
            loss = self._step_at_once(closure)
        latest = self.backward.latest
        combined = latest is not None and self.profiler.record is latest.record
        if combined and self.backward.everyone:
            self._after_step(self)
        return loss

    def _step_at_once(self, closure: Callable[[], Any] | None) -> Any:
        self.flush()
        try:
            loss = raw_step(self._cls)(self.optimizer, *(() if closure is None else (closure,)))
        except Exception as error:
            if not isinstance(error, SoonestError):
                self._failures.tell(f"optimizer.step() raised {error!r}")
            raise
        if self.backward.latest is not None:
            self.profiler.record = self.backward.latest.record
        self._in_flight.watch()
        return loss

    def _step_by_bucket(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pass_state = self.backward.latest
        if pass_state is None or pass_state.step is not None:  # no backward pass was combined since
            record = self.profiler.new_record()
            before, pass_state = (
                pass_state,
                PassState(self.backward.passes, self.bound_plan, record, local=True),
            )
            if before is not None:
                pass_state.unused |= before.unused
                pass_state.users = before.users
            self.lane.begin(pass_state)
        scaled = self.optimizer.__dict__.get("grad_scale") is not None
        gradients = self.gradients.of(
            self._updater.owned, self._in_flight.unknown, self._in_flight.copies, scaled=scaled
        )
        call = self._updater.call(gradients)
        aliased = self._aliases.of(self.layout.params[order] for order in gradients)
        state_is_kept = self.state.is_kept(names=self._updater.seen_state is not None)
        self._in_flight.expect(pass_state, gradients)
        self.profiler.record = pass_state.record
        pass_state.step = call
        if scaled and pass_state.plan.sharded:  # each rank divides its parts, where it updates them
            pass_state.whole = False
        self.lane.advance()
        for param in aliased:
            pending.wait_for(param.parameter)
        if state_is_kept:
            self.flush()
        return loss

    def groups_changed(self) -> None:
        """The optimizer has other parameters; a collective call if they have not been trained.

        Raises:
            ValueError: it has some that are not the model's.
        """
        _log.debug("the optimizer has other parameter groups than before")
        checks.check_optimizer(self.model, self.optimizer, self._updater.held)
        self.flush()
        self._updater.regroup()
        if self._newcomers is not None:
            self._newcomers.look(self.layout.params)
            if parameters := self._newcomers.come():
                self._take_in(parameters)

    def clear_gradients(self) -> None:
        """What ``optimizer.zero_grad()`` does: those in flight go on without their names."""
        self._in_flight.unknown.clear()
        patch.clear(self.optimizer)

    # The handle

    @property
    def failures(self) -> FailureReporter:
        """Who the ranks are."""
        return self._failures

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
        if self._in_flight.flying:
            self.lane.wait_all()
            self.lane.check()  # what has failed meanwhile is no longer waited for
            if not self.backward.under_way:
                self._in_flight.all()

    def finish(self, limit_s: float) -> str | None:
        """Waits until nothing is under way that other ranks need, or for so long.

        Returns:
            What is under way then, in words; None if nothing is.
        """
        if (what := self.lane.waits_for(limit_s)) is not None:
            return what
        if self._buffers is not None:
            self._buffers.wait_sent()
        latest = self.backward.latest
        if latest is not None and latest.users is not None:
            with self._failures.together("ending"):
                if not latest.users.are_known(limit_s):
                    return f"step {latest.number}: which parameters each rank has used"
        return None

    def complete(self) -> None:
        """Makes every gradient whole again where ranks have parts of it; a collective call."""
        self.lane.wait_all()
        latest = self.backward.latest
        if latest is not None and not latest.whole:
            self.bound_plan.gather_gradients(latest)
            self._in_flight.all()
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
            return self.state.parts.clip(
                self.bound_plan.parts_with_gradient(pass_state), max_norm, norm_type, error
            )

    def detach(self) -> None:
        """Leaves the model and the optimizer as they would be without soonest, in any case.

        Raises:
            SoonestError: a rank was lost or an update failed, and nobody has been told so yet; the
                message says what is missing.
        """
        known, found = self.lane.error, None
        try:
            if known is None:
                self.flush()
                if self.state.parts is not None:
                    self._in_flight.complete_all()
                self.state.hand_back()
        except SoonestError as error:
            found = error
            if isinstance(error, PeerLostError):
                self.lane.fail(error)
        finally:
            missing = self._missing() if known or found else ""
            self._let_go()
        if found is not None:
            raise type(found)(f"{found}{missing and f'. {missing}'}") from found
        if missing:
            _log.warning("detach() after a failure: %s", missing)

    def _missing(self) -> str:
        """What is not as it would be had nothing failed, in words."""
        missing = undone(self.bound_plan)
        if self.state.parts is not None:
            missing += "; " * bool(missing) + (
                "the optimizer's state is shared out over the ranks, and this one has only its "
                "part: handle.local_optimizer_state() gives it"
            )
        return missing

    def _let_go(self) -> None:
        self.lane.close()  # so that nothing is written any more
        self.backward.detach()
        for hook in (*self._model_hooks, self._module_hooks, self._entries):
            hook.remove()
        if self._buffers is not None:
            self._buffers.drop()
        self._in_flight.drop()
        patch.hand_back(self.optimizer)
        self.layout.move_out()
