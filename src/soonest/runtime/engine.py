"""Turns what happens in a training loop into progress of the plan."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.core.network import Network
from soonest.core.plan import Plan
from soonest.core.timeline import Timeline
from soonest.core.trace import Trace
from soonest.errors import SoonestError
from soonest.runtime import guard, takeover
from soonest.runtime.bystanders import Aliases, unshared
from soonest.runtime.callbacks import OnForward, nobody, on_gradient
from soonest.runtime.collectives import Ranks, Wire
from soonest.runtime.landing import Landing
from soonest.runtime.lanes import Lane
from soonest.runtime.layout import Layout, Member, changed
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

    Attributes:
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
        self.synchronizing = True
        self.after_backward: Callable[[Engine, Sequence[Member]], None] = nobody
        self._forward_ended = NEVER
        self._sweeps_begun = 0
        self._open: Sweep | None = None
        self._hooks: list[Any] = []
        self._last_complete: tuple[Record, Plan, list[Member]] | None = None
        self._complete_records: deque[Record] = deque(maxlen=_REMEMBERED)
        self._module_hooks = guard.ModuleHooks(model)
        self.settled = False
        self.history: list[str] = []
        self._aliases = Aliases()
        self.inputs: list[str] = []
        self.attention = Attention(len(layout.members))
        takeover.take_over(optimizer, self, self.state)
        self.bind(layout, plan)
        self._model_hooks = [
            model.register_forward_pre_hook(OnForward(self.forward_begins), with_kwargs=True),
            model.register_forward_hook(OnForward(self.forward_ends)),
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
        self.divide_by(self.ranks.group.size())
        for member in layout.members:
            member.sweep = None
            before = on_gradient(self, Engine._before, member.order)
            after = on_gradient(self, Engine._after, member.order)
            self._hooks.append(member.parameter.register_hook(before))
            self._hooks.append(member.parameter.register_post_accumulate_grad_hook(after))
        self._landing.watch()

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
        return Record(len(self.layout.members), len(plan.ops), len(plan.buckets), closely=closely)

    # In the forward pass

    def forward_begins(self, *inputs: Any) -> None:
        if self._sweeps_begun == 0:  # what was read before it does not show the order of use
            self.inputs = [f"{tuple(x.shape)} {x.dtype}" for x in guard.tensors_in(inputs)]
            self.record = self._new_record()
            self._landing.watch()

    def forward_ends(self, *_: Any) -> None:
        self._forward_ended = now_s()
        if math.isnan(self.record.forward_ended):
            self.record.forward_ended = self._forward_ended

    # In the backward pass

    def _before(self, member: Member, gradient: Tensor) -> None:
        """A gradient is about to be written where another may still be in flight."""
        if self._open is not None and not math.isnan(self._open.record.ready[member.order]):
            raise self._unfinished(self._open)
        if member.order in self._landing.unknown:
            guard.land(member.parameter)  # what is added to must be known
        self._landing.make_room(member)

    def _after(self, member: Member, parameter: nn.Parameter) -> None:
        """A gradient has been written to ``parameter.grad``."""
        if self.synchronizing:
            sweep = self._open
            if sweep is None:
                sweep = self._begin()
                torch.autograd.Variable._execution_engine.queue_callback(self._close)
            # None: the graph led here, but with an undefined gradient.
            if parameter.grad is not None:
                self._contribute(sweep, member)

    def _begin(self) -> Sweep:
        """The first gradient of a backward pass that is to be combined."""
        self.lane.check()
        record = self._new_record(closely=self.attention.closely())
        record.backward_began = self._forward_ended
        if math.isnan(self._forward_ended):  # the user does not call the model itself
            record.backward_began = now_s()
        if self._sweeps_begun == 0:
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
        return sweep

    def contribute_nothing(self) -> None:
        """Takes part in a backward pass that only others have: no gradient changes here."""
        sweep = self._begin()
        for member in self.layout.members:
            guard.land(member.parameter)
            self._landing.make_room(member)
            if member.parameter.grad is member.grad:
                member.parameter.grad = member.raw_grad.clone()
            self._lack(sweep, member)
        self._closed(sweep)

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
        sweep.record.ready[member.order] = now_s()
        if sweep.arrived(self.program.buckets_of[member.order]):
            self.lane.advance()

    def _close(self) -> None:
        """The backward pass is over: who got no gradient contributes what it has, or zeros."""
        sweep = self._open
        assert sweep is not None
        ready = sweep.record.ready
        late = [member for member in self.layout.members if math.isnan(ready[member.order])]
        for member in late:
            self._landing.make_room(member)
            if member.parameter.grad is not None:
                sweep.kept.add(member.order)
                self._contribute(sweep, member)
                continue
            self._landing.unknown.add(member.order)
            self._lack(sweep, member)
            self._landing.hold(member)
        self._closed(sweep)
        self.after_backward(self, late)

    def _lack(self, sweep: Sweep, member: Member) -> None:
        """Contributes zeros in the place of a gradient."""
        member.raw_grad.zero_()
        sweep.unused.add(member.order)
        self._arrived(sweep, member)

    def _closed(self, sweep: Sweep) -> None:
        sweep.record.backward_ended = now_s()
        sweep.closed = True
        self._open = None
        self.lane.advance()

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
        if not self._updater.is_current:
            self.flush()
            self._updater.refresh()
        blocking = self.program.plan.blocking
        if self._separable and not (blocking and self.state.parts is None):
            loss = self._step_by_bucket(closure)
            if blocking:
                self.flush()
                self._landing.watch()
        else:
            loss = self._step_at_once(closure)
        if self.latest is not None and self.record is self.latest.record:
            self._after_step(self)
        return loss

    def _step_at_once(self, closure: Callable[[], Any] | None) -> Any:
        self.flush()
        unshared(self.model, self.layout, self._updater)
        loss = raw_step(self._cls)(self.optimizer, *(() if closure is None else (closure,)))
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
        call = self._updater.call(self._gradients())
        alone = unshared(self.model, self.layout, self._updater)
        aliased = self._aliases.of(self.layout.members[order] for order in call.gradients)
        for order, gradient in call.gradients.items():
            member = self.layout.members[order]
            member.sweep = sweep
            self._landing.hold(member)
            self._landing.hold_gradient(member, gradient)
        self.record = sweep.record
        self._landing.flying = True
        sweep.step = call
        self.lane.advance()
        if alone:
            self._updater.apply_alone(call, alone)
        for member in aliased:
            guard.land(member.parameter)
        return loss

    def _gradients(self) -> dict[int, Tensor]:
        """By order of the member, the gradients that the optimizer is to use."""
        found: dict[int, Tensor] = {}
        with guard.DisableGuard():
            for member in self._updater.owned:
                gradient = member.parameter.grad
                if member.parameter.data_ptr() != member.address:
                    self.layout.take_back(member)
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
            if self._open is None:
                self._landing.all()

    def complete(self) -> None:
        """Makes every gradient whole again where ranks have parts of it; a collective call."""
        self.lane.wait_all()
        if self.latest is not None and not self.latest.whole:
            self.program.gather_gradients(self.latest)
            self._landing.all()
        self.flush()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self.synchronizing = self.synchronizing, False
        try:
            yield
        finally:
            self.synchronizing = before

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
        for hook in (*self._hooks, *self._model_hooks, self._module_hooks):
            hook.remove()
        self._landing.drop()
        takeover.hand_back(self.optimizer)
        self.layout.move_out()
        self.lane.close()
