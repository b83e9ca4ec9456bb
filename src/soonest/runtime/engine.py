"""Turns what happens in a training loop into progress of the plan."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.core.network import Network
from soonest.core.plan import Plan
from soonest.core.timeline import Timeline
from soonest.core.trace import Trace
from soonest.errors import SoonestError
from soonest.runtime import checks, compiled, guard, modes, takeover
from soonest.runtime.accumulation import AccumulationHooks, InnerPasses
from soonest.runtime.buffers import Buffers
from soonest.runtime.bystanders import Aliases
from soonest.runtime.calls import Calling, nobody, weakly
from soonest.runtime.collectives import Ranks, Wire
from soonest.runtime.landing import Landing
from soonest.runtime.lanes import Lane
from soonest.runtime.layout import Layout, Member, changed
from soonest.runtime.newcomers import Newcomers, admit
from soonest.runtime.peers import Peers
from soonest.runtime.profile import (
    NEVER,
    Attention,
    Measured,
    Record,
    measured,
    now_s,
    timeline_of,
    trace_of,
    typical,
    updating_s,
)
from soonest.runtime.program import Program
from soonest.runtime.state import OptimizerState
from soonest.runtime.sweep import Sweep
from soonest.runtime.update import Updater, raw_step

_E = TypeVar("_E", bound=Exception)
_REMEMBERED = 20
"""Closely watched steps from which measured times are medians."""


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
        peers: who the ranks are.
        after_step: called at the end of each ``step()`` that used combined gradients; on every
            rank after the same steps.
        buffers: to be sent around after each backward pass, if there are any.
        newcomers: looks out for parameters that come to be trained; None if they are left alone.
        anew: called with a layout that holds them, too, to plan and bind anew.

    Attributes:
        siblings: engines of other parameters of the same model: a backward pass combines all.
        uneven: what to do when others have no more input, while that may be.
        everyone: all ranks took part in the last backward pass that was combined.
        attention: which steps to watch closely.
        settled: the plan stays.
        history: how plans have changed so far, and why, one sentence each.
        inputs: shapes and dtypes of the tensors that the first forward pass was given.
        synchronizing: backward passes combine gradients, instead of only accumulating them here.
        latest: the last backward pass that was combined, or is being so.
        after_backward: called at the end of each one that does, with the members it gave nothing.
        observed: the record of the first forward pass, once a backward pass has followed it.
    """

    observed: Record

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        separable: bool,
        layout: Layout,
        plan: Plan,
        ranks: Ranks,
        lane: Lane,
        sharing: Ranks | None,
        wire: Wire,
        peers: Peers,
        after_step: Callable[[Engine], None],
        buffers: Buffers | None = None,
        newcomers: Newcomers | None = None,
        anew: Callable[[Engine, Layout], None] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.lane = lane
        self._wire = wire
        self._peers = peers
        self._separable = separable
        self._cls = type(optimizer)
        self.state = OptimizerState(optimizer, self._cls, sharing, wire, peers)
        self._after_step = after_step
        self._buffers = buffers
        self._newcomers = newcomers
        self._anew = anew
        self.siblings: list[Engine] = []
        self.uneven: Uneven | None = None
        self.everyone = True
        self.synchronizing = True
        self.after_backward: Callable[[Engine, Sequence[Member]], None] = nobody
        self._forward_ended = NEVER
        self._sweeps_begun = 0
        self._unobserved = True
        self._open: Sweep | None = None
        self._ends_with_all = False
        self._inner = InnerPasses()
        self._hooks: list[Any] = []
        self._last_complete: tuple[Record, Plan, list[Member]] | None = None
        self._complete_records: deque[Record] = deque(maxlen=_REMEMBERED)
        self._entries = compiled.Entries(model)
        self._module_hooks = guard.ModuleHooks(self._entries.outside())
        self.settled = False
        self.history: list[str] = []
        self._aliases = Aliases()
        self.inputs: list[str] = []
        self.attention = Attention(len(layout.members))
        takeover.take_over(optimizer, self, self.state)
        self.bind(layout, plan)
        self._model_hooks = [
            model.register_forward_pre_hook(Calling(self.forward_begins), with_kwargs=True),
            model.register_forward_hook(Calling(self.forward_ends)),
        ]

    def bind(self, layout: Layout, plan: Plan) -> None:
        """From now on, run this plan on these buffers. Nothing may be in flight."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._complete_records.clear()
        self.latest: Sweep | None = None
        self.layout = layout
        self._updater = Updater(self.optimizer, self._cls, layout.members)
        self.state.bind(layout, plan)
        self.program = Program(
            plan, layout, self.ranks, self._updater, state=self.state.parts, wire=self._wire
        )
        self._landing = Landing(self.program, self.lane, self._module_hooks)
        self.attention.refresh()
        self.record = self._new_record()
        self._divisor = 0
        self.divide_by(self.ranks.group.size())
        for member in layout.members:
            member.sweep = None
            self._hooks.append(self._hooks_of(member))
        if self._newcomers is not None:
            for parameter in self._newcomers.look(layout.members):
                self._hooks.append(AccumulationHooks(parameter, after=weakly(self._newcomer)))
        self._landing.watch()

    def _hooks_of(self, member: Member) -> AccumulationHooks:
        # Not the member itself, which may lead here.
        before, after = weakly(self._before, member.order), weakly(self._after, member.order)
        return AccumulationHooks(member.parameter, before=before, after=after)

    def _take_back(self) -> None:
        """Parameters that the user has given other memory come back into the buffers."""
        with guard.DisableGuard():
            for member in self.layout.members:
                if member.parameter.data_ptr() != member.address:
                    try:
                        self.layout.take_back(member)
                    except SoonestError as error:
                        raise self._at_fault(error) from None
                    if self._hooks[member.order].is_outdated:
                        self._hooks[member.order].remove()
                        self._hooks[member.order] = self._hooks_of(member)

    @property
    def passes(self) -> int:
        """How many backward passes have been combined, or are being so."""
        return self._sweeps_begun

    def watch(self) -> None:
        """Takes note of when each parameter is needed, though nothing is in flight."""
        self._landing.watch()

    @property
    def record(self) -> Record:
        """Of the step that the next forward pass belongs to."""
        return self._landing.record

    @record.setter
    def record(self, record: Record) -> None:
        self._landing.record = record

    def divide_by(self, ranks: int) -> None:
        """From now on, combined gradients are sums over all ranks divided by this number."""
        if ranks == self._divisor:  # a device would be asked for nothing
            return
        self._divisor = ranks
        # What to multiply by: as a tensor, and not a number, it is ready for use.
        self._shares = [
            torch.tensor(
                1.0 / ranks,
                dtype=torch.promote_types(grads.dtype, torch.float32),
                device=grads.device,
            )
            for grads in self.layout.grads
        ]

    def _new_record(self, *, closely: bool = True) -> Record:
        plan = self.program.plan
        sizes = (len(self.layout.members), len(plan.ops), len(plan.buckets))
        return Record(*sizes, closely=closely, clock=self.lane.clock)

    def _now(self) -> float:
        return now_s() if self.lane.clock is None else self.lane.clock.now()

    # In the forward pass

    def forward_begins(self, *inputs: Any) -> None:
        self._ends_with_all = False
        self._take_back()
        if self._buffers is not None:
            self._buffers.land()
        if self._unobserved:  # what was read before it does not show the order of use
            self.inputs = [f"{tuple(x.shape)} {x.dtype}" for x in guard.tensors_in(inputs)]
            self.record = self._new_record()
            self._landing.watch()
        if self._entries.outdated():
            self._look_at_modules()
        if self._entries.whole or modes.is_compiling():
            self._land_all()

    def forward_ends(self, inputs: Any = None, output: Any = None, *_: Any) -> None:
        self._forward_ended = self._now()
        if math.isnan(self.record.forward_ended):
            self.record.forward_ended = self._forward_ended
        if torch.is_grad_enabled() and modes.is_plain():
            for tensor in guard.tensors_in(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(weakly(self._backward_begins))

    # In the backward pass

    def _backward_begins(self, _: Tensor) -> None:
        """Its end is that of the whole pass, not of a checkpoint's inside it."""
        if not self._ends_with_all:
            self._ends_with_all = True
            self._inner.begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        self._ends_with_all = False
        for engine in (self, *self.siblings):
            if engine._open is not None:
                engine._close(engine._open)

    def _before(self, order: int, _: Any) -> None:
        """A gradient is about to be written where another may still be in flight."""
        member = self.layout.members[order]
        if self._open is not None and not math.isnan(self._open.record.ready[member.order]):
            raise self._repeated(member) if self._inner.here() else self._unfinished(self._open)
        if member.order in self._landing.unknown:
            guard.land(member.parameter)  # what is added to must be known
        self._landing.make_room(member)

    def _after(self, order: int, *_: Any) -> None:
        """A gradient has been written to ``parameter.grad``."""
        member = self.layout.members[order]
        sweep = self._sweep_of_this_pass()
        # No gradient: the graph led here, but with an undefined one.
        if sweep is None or member.parameter.grad is None:
            return
        if not self._inner.must_wait(member.parameter):
            self._contribute(sweep, member)

    def _newcomer(self, *_: Any) -> None:
        """A parameter has a gradient that is not a member yet: the end of this pass shows it."""
        self._sweep_of_this_pass()

    def _sweep_of_this_pass(self) -> Sweep | None:
        """What combines the gradients of this backward pass, if they are to be."""
        if not self.synchronizing:
            return None
        if self._open is None:
            self._begin()
            if not self._ends_with_all:
                self._inner.begin()
                torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)
        return self._open

    def _begin(self, *, active: bool = True) -> Sweep:
        """The first gradient of a backward pass that is to be combined.

        Args:
            active: it is one of this rank.
        """
        self.lane.check()
        self.everyone = self.uneven is None or (active and self.uneven.all_are_active())
        record = self._new_record(closely=self.attention.closely())
        record.backward_began = self._forward_ended
        if math.isnan(self._forward_ended):  # the user does not call the model itself
            record.backward_began = self._now()
        if self._unobserved:
            self._unobserved = False
            self.observed = self.record
        self.record.ended = record.backward_began
        if self.record.complete:
            self._last_complete = (self.record, self.program.plan, self.layout.members)
            self._complete_records.append(self.record)
        sweep = Sweep(self._sweeps_begun, self.program, record)
        self._sweeps_begun += 1
        self._open = self.latest = sweep
        self._landing.flying = True
        self.lane.begin(sweep)
        for engine in self.siblings:
            if engine._open is None:
                engine._begin()
        return sweep

    def contribute_nothing(self) -> None:
        """Takes part in a backward pass that only others have: no gradient changes here."""
        sweep = self._begin(active=False)
        for member in self.layout.members:
            guard.land(member.parameter)
            self._landing.make_room(member)
            if member.parameter.grad is member.grad:
                member.parameter.grad = member.raw_grad.clone()
            self._lack(sweep, member)
        self._closed(sweep)
        self._share_buffers(active=False)

    def _contribute(self, sweep: Sweep, member: Member) -> None:
        """Puts ``parameter.grad`` into the flat buffer, divided as DDP does before it sums."""
        gradient = member.parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            sparse = f"the gradient of {member.name!r} is sparse and cannot be combined"
            raise self._at_fault(ValueError(f"{sparse}: use dense gradients (sparse=False)"))
        if member.grad.data_ptr() != member.grad_address:
            self.layout.take_back_gradient(member)
        if torch.is_grad_enabled():  # backward(create_graph=True)
            gradient = gradient.detach()
        if gradient is member.grad:
            member.raw_grad.mul_(self._shares[member.flat])
        else:
            try:
                torch.mul(gradient, self._shares[member.flat], out=member.raw_grad)
                member.parameter.grad = member.grad
            except RuntimeError as error:
                raise self._at_fault(changed(member)) from error
        del gradient  # free its memory before anything else is allocated
        self._arrived(sweep, member)

    def _at_fault(self, error: _E) -> _E:
        """Tells the others, who would wait for this rank, of an error that is to be raised here."""
        self._peers.tell(str(error))
        return error

    def _arrived(self, sweep: Sweep, member: Member) -> None:
        member.sweep = sweep
        self._landing.hold_gradient(member, member.grad)
        sweep.record.ready[member.order] = sweep.record.now()
        buckets = self.program.buckets_of[member.order]
        self.lane.ready(sweep, buckets)
        if sweep.arrived(buckets):
            self.lane.advance()

    def _close(self, sweep: Sweep) -> None:
        """The backward pass is over: who got no gradient contributes what it has, or zeros."""
        ready, waited = sweep.record.ready, self._inner.end()
        late = [member for member in self.layout.members if math.isnan(ready[member.order])]
        for member in late:
            self._landing.make_room(member)
            if id(member.parameter) in waited:
                self._contribute(sweep, member)
                continue
            if member.parameter.grad is not None:
                sweep.kept.add(member.order)
                self._contribute(sweep, member)
                continue
            self._landing.unknown.add(member.order)
            self._lack(sweep, member)
            self._landing.hold(member)
        self._closed(sweep)
        self._share_buffers(active=True)
        if self._newcomers is not None and (parameters := self._newcomers.come()):
            self._take_in(parameters)
        self.after_backward(self, [m for m in late if id(m.parameter) not in waited])

    def _look_at_modules(self) -> None:
        """The model has come to have other modules, or compiled ones."""
        self._land_all()
        self._entries.renew()
        self._module_hooks.move_to(self._entries.outside())

    def _land_all(self) -> None:
        """Also what has arrived and is only watched."""
        self.flush()
        if self._open is None:
            self._landing.all()

    def _share_buffers(self, *, active: bool) -> None:
        if self._buffers is not None:
            uneven = self.uneven is not None and self.uneven.enabled
            self._buffers.share(active=active if uneven else None)

    def _take_in(self, parameters: Sequence[nn.Parameter]) -> None:
        """Trains these, too, from now on; a collective call."""
        assert self._anew is not None
        self.complete()
        admit(self.ranks, parameters)
        self._look_at_modules()
        if self._buffers is not None:
            self._buffers.look(self.model)
        self._unobserved = True
        self._anew(self, self.layout.grown())
        self.state.adopt()

    def _lack(self, sweep: Sweep, member: Member) -> None:
        """Contributes zeros in the place of a gradient."""
        member.raw_grad.zero_()
        sweep.unused.add(member.order)
        self._arrived(sweep, member)

    def _closed(self, sweep: Sweep) -> None:
        sweep.record.backward_ended = sweep.record.now()
        sweep.closed = True
        self._open = None
        self.lane.advance()

    def _repeated(self, member: Member) -> SoonestError:
        return self._at_fault(
            SoonestError(
                f"{member.name!r} got a second gradient in one backward pass, from a checkpoint, "
                "when its only one so far was shared already: give torch.utils.checkpoint "
                "use_reentrant=False"
            )
        )

    def _unfinished(self, sweep: Sweep) -> SoonestError:
        missing = [m.name for m in self.layout.members if math.isnan(sweep.record.ready[m.order])]
        names = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        error = SoonestError(
            f"backward pass {sweep.number} did not finish (did backward() raise?): this rank has "
            f"not shared the gradients of {names or 'any parameter twice'}, and the others wait "
            "for them; restart from a checkpoint"
        )
        return self._at_fault(error)

    # The optimizer

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """What the user's ``optimizer.step(closure)`` does."""
        self.lane.check()
        if self._open is not None:
            raise self._unfinished(self._open)
        if self._updater.outdated():
            self.groups_changed()
        blocking = self.program.plan.blocking
        whole = self.state.parts is None and (blocking or self._updater.trains_others())
        if self._separable and not whole:
            loss = self._step_by_bucket(closure)
            if blocking:
                self.flush()
                self._landing.watch()
        else:
            loss = self._step_at_once(closure)
        if self.everyone and self.latest is not None and self.record is self.latest.record:
            self._after_step(self)
        return loss

    def groups_changed(self) -> None:
        """The optimizer has other parameters; a collective call if they have not been trained.

        Raises:
            ValueError: it has some that are not the model's.
        """
        checks.check_optimizer(self.model, self.optimizer)
        self.flush()
        self._updater.regroup()
        if self._newcomers is not None:
            self._newcomers.look(self.layout.members)
            if parameters := self._newcomers.come():
                self._take_in(parameters)

    def _step_at_once(self, closure: Callable[[], Any] | None) -> Any:
        self.flush()
        try:
            loss = raw_step(self._cls)(self.optimizer, *(() if closure is None else (closure,)))
        except Exception as error:
            if not isinstance(error, SoonestError):
                self._peers.tell(f"optimizer.step() raised {error!r}")
            raise
        if self.latest is not None:
            self.record = self.latest.record
        self._landing.watch()
        return loss

    def _step_by_bucket(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sweep = self.latest
        if sweep is None or sweep.step is not None:  # no backward pass was combined since
            sweep = Sweep(self._sweeps_begun, self.program, self._new_record(), local=True)
            self.lane.begin(sweep)
        self._take_back()
        call = self._updater.call(self._gradients())
        aliased = self._aliases.of(self.layout.members[order] for order in call.gradients)
        for order, gradient in call.gradients.items():
            member = self.layout.members[order]
            member.sweep = sweep
            self._landing.hold(member)
            self._landing.hold_gradient(member, gradient)
        if self.program.plan.sharded:  # gathering writes to all parameters, if only what is there
            for member in self.layout.members:
                if member.order not in call.gradients:
                    member.sweep = sweep
                    self._landing.hold(member)
        self.record = sweep.record
        self._landing.flying = True
        sweep.step = call
        self.lane.advance()
        for member in aliased:
            guard.land(member.parameter)
        return loss

    def _gradients(self) -> dict[int, Tensor]:
        """By order of the member, the gradients that the optimizer is to use."""
        found: dict[int, Tensor] = {}
        with guard.DisableGuard():
            for member in self._updater.owned:
                gradient = member.parameter.grad
                if gradient is member.grad and member.grad.data_ptr() != member.grad_address:
                    self.layout.take_back_gradient(member)
                if gradient is None and member.order in self._landing.unknown:
                    gradient = member.grad
                if gradient is not None:
                    found[member.order] = gradient
        return found

    def clear_gradients(self) -> None:
        """What ``optimizer.zero_grad()`` does: those in flight go on without their names."""
        self._landing.unknown.clear()
        takeover.clear(self.optimizer)

    # The handle

    def flush(self) -> None:
        """Waits until nothing is in flight: every parameter and gradient has its value."""
        self.lane.check()
        if self._landing.flying:
            self.lane.wait_all()
            self.lane.check()  # what has failed meanwhile is no longer waited for
            if self._open is None:
                self._landing.all()
        if self._buffers is not None:
            self._buffers.land()

    def finish(self) -> None:
        """Waits until nothing is under way that other ranks need."""
        self.lane.wait_all()
        if self._buffers is not None:
            self._buffers.land()

    def complete(self) -> None:
        """Makes every gradient whole again where ranks have parts of it; a collective call."""
        self.lane.wait_all()
        if self.latest is not None and not self.latest.whole:
            self.program.gather_gradients(self.latest)
            self._landing.all()
        self.flush()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before = self.synchronizing
        engines = (self, *self.siblings)
        for engine in engines:
            engine.synchronizing = False
        try:
            yield
        finally:
            for engine in engines:
                engine.synchronizing = before

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error: bool) -> Tensor:
        """Clips this rank's parts of the gradients by the norm of all; a collective call."""
        assert self.state.parts is not None
        self.lane.wait_all()
        sweep = self.latest
        if sweep is None or sweep.step is not None:
            raise SoonestError(
                "there are no gradients to clip: call clip_grad_norm_ between backward() and step()"
            )
        with guard.DisableGuard():
            return self.state.parts.clip(
                self.program.parts_with_gradient(sweep), max_norm, norm_type, error
            )

    def measured(self, network: Network) -> Measured:
        """What ops took in the last steps that were watched closely."""
        return measured(list(self._complete_records), self.program.plan, network)

    def timeline(self) -> Timeline | None:
        return timeline_of(*self._last_complete) if self._last_complete else None

    def trace(self) -> Trace | None:
        """The model as the steps showed it that were watched closely; None before there is one."""
        records, model = self._complete_records, type(self.model).__name__
        parts = self.program.plan.ranks if self.program.plan.sharded else 1
        found = [
            trace_of(r, r, self.layout.members, model=model, update_s=parts * updating_s(r))
            for r in list(records)
        ]
        return typical(found) if found else None

    def detach(self) -> None:
        """Leaves the model and the optimizer as they would be without soonest."""
        if self.lane.error is None:
            self.flush()
            self.state.hand_back()
        for hook in (*self._hooks, *self._model_hooks, self._module_hooks, self._entries):
            hook.remove()
        for engine in self.siblings:
            engine.siblings.remove(self)
        if self._buffers is not None:
            self._buffers.drop()
        self._landing.drop()
        takeover.hand_back(self.optimizer)
        self.layout.move_out()
        self.lane.close()


class Uneven(Protocol):
    """What an engine needs to know while ranks may run out of input."""

    @property
    def enabled(self) -> bool:
        """Whether that may be now."""
        ...

    def all_are_active(self) -> bool:
        """Called by a rank that has input: whether all have; a collective call."""
        ...
