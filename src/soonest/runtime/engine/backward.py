"""Backward passes as sweeps of the plan: each gradient is shared as soon as it is ready."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from soonest.errors import SoonestError
from soonest.runtime.comm.failures import Peers
from soonest.runtime.engine.in_flight import Landing
from soonest.runtime.execute.bound_plan import Program
from soonest.runtime.execute.lane import Lane
from soonest.runtime.execute.pass_state import Sweep
from soonest.runtime.flat.buffers import Member, has_alias
from soonest.runtime.flat.gradients import Gradients
from soonest.runtime.guard import pending
from soonest.runtime.guard.accumulation import AccumulationHooks, InnerPasses
from soonest.runtime.guard.hooks import weakly
from soonest.runtime.timing.lateness import Lateness
from soonest.runtime.timing.profiler import Profiler


class Backward:
    """The backward passes of one prioritized model.

    Args:
        lane: executes the sweeps.
        peers: who the ranks are.
        profiler: keeps their records.
        ended: called at the end of each that was combined, with the members it gave nothing.

    Attributes:
        siblings: the same of other parameters of the same model: a pass combines all.
        lateness: compares this rank's passes with those of the others, where that is known.
        uneven: what to do when others have no more input, while that may be.
        everyone: all ranks took part in the last one that was combined.
        synchronizing: gradients are combined, instead of only being accumulated here.
        passes: how many have been combined, or are being so.
        latest: the last of those.
    """

    def __init__(
        self,
        lane: Lane,
        peers: Peers,
        profiler: Profiler,
        ended: Callable[[Sequence[Member]], None],
    ) -> None:
        self._lane = lane
        self._peers = peers
        self._profiler = profiler
        self._ended = ended
        self.siblings: list[Backward] = []
        self.lateness: Lateness | None = None
        self.uneven: Uneven | None = None
        self.everyone = True
        self.synchronizing = True
        self.passes = 0
        self.latest: Sweep | None = None
        self._looked_at: Sweep | None = None
        self._open: Sweep | None = None
        self._ends_with_all = False
        self._inner = InnerPasses()
        self._hooks: list[AccumulationHooks] = []
        self._frozen: list[nn.Parameter] = []

    def bind(
        self,
        program: Program,
        landing: Landing,
        gradients: Gradients,
        newcomers: Sequence[nn.Parameter],
    ) -> None:
        """From now on, passes share the gradients of this program's members.

        Args:
            program: to sweep.
            landing: holds what is in flight.
            gradients: of the members.
            newcomers: other parameters that may come to be trained.
        """
        self._program, self._landing, self._gradients = program, landing, gradients
        self._members = program.layout.members
        self.latest = None
        self._fresh = bytearray(len(self._members))
        self._aliased: list[Member] = []
        self._remove_hooks()
        for member in self._members:
            member.sweep = None
            self._hooks.append(self._hooks_of(member))
        self._frozen = list(newcomers)
        self._look_out()

    def _look_out(self) -> None:
        """Hooks on what is trained by now: on a frozen one they would count as a use of it."""
        trained = [parameter for parameter in self._frozen if parameter.requires_grad]
        if not trained:
            return
        self._frozen = [parameter for parameter in self._frozen if not parameter.requires_grad]
        for parameter in trained:
            self._hooks.append(AccumulationHooks(parameter, after=weakly(self._newcomer)))

    def _hooks_of(self, member: Member) -> AccumulationHooks:
        # Not the member itself, which may lead here.
        before, after = weakly(self._before, member.order), weakly(self._after, member.order)
        return AccumulationHooks(member.parameter, before=before, after=after)

    def renew_hooks(self, member: Member) -> None:
        """The parameter may be another to autograd than it was."""
        if self._hooks[member.order].is_outdated:
            self._hooks[member.order].remove()
            self._hooks[member.order] = self._hooks_of(member)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def under_way(self) -> bool:
        """Whether one has begun and not ended."""
        return self._open is not None

    def check(self) -> None:
        """Raises SoonestError if one has begun and not ended: then it never will."""
        if self._open is not None:
            raise self._unfinished(self._open)

    def _unfinished(self, sweep: Sweep) -> SoonestError:
        missing = [m.name for m in self._members if math.isnan(sweep.record.ready[m.order])]
        names = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        error = SoonestError(
            f"backward pass {sweep.number} did not finish (did backward() raise?): this rank has "
            f"not shared the gradients of {names or 'any parameter twice'}, and the others wait "
            "for them; restart from a checkpoint"
        )
        return self._peers.at_fault(error)

    def _repeated(self, member: Member) -> SoonestError:
        return self._peers.at_fault(
            SoonestError(
                f"{member.name!r} got a second gradient in one backward pass, from a checkpoint, "
                "when its only one so far was shared already: give torch.utils.checkpoint "
                "use_reentrant=False"
            )
        )

    # From begin to end

    def forward_begins(self) -> None:
        """A new graph is made; an earlier pass through the whole model may have raised."""
        self._ends_with_all = False
        self._look_out()

    def expect(self, output: Any) -> None:
        """A pass through the whole model may begin at this output of it."""
        for tensor in pending.tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(weakly(self._begins_with_all))

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
        member = self._members[order]
        if self._open is not None and not math.isnan(self._open.record.ready[order]):
            raise self._repeated(member) if self._inner.here() else self._unfinished(self._open)
        if self._open is None and self._looked_at is not self.latest:
            self._look_at_kept()
        if order in self._landing.unknown:
            pending.land(member.parameter)  # what is added to must be known
        self._landing.make_room(member)
        with pending.DisableGuard():
            gradient = member.parameter.grad
            self._fresh[order] = gradient is None
            if gradient is not None and gradient is not member.grad:
                self._gradients.check_own(member, gradient)

    def _look_at_kept(self) -> None:
        """A pass begins, before anything is written to the buffers."""
        self._looked_at = latest = self.latest
        if latest is not None and latest.step is None and not latest.whole:
            self._landing.complete_kept()

    def _after(self, order: int, *_: Any) -> None:
        """A gradient has been written to ``parameter.grad``."""
        member = self._members[order]
        sweep = self._sweep_of_this_pass()
        # No gradient: the graph led here, but with an undefined one.
        if sweep is None or member.parameter.grad is None:
            return
        if not self._inner.must_wait(member.parameter):
            self._contribute(sweep, member, fresh=bool(self._fresh[order]))

    def _newcomer(self, *_: Any) -> None:
        """A parameter has a gradient that is not a member yet: the end of this pass shows it."""
        self._sweep_of_this_pass()

    def _sweep_of_this_pass(self) -> Sweep | None:
        """What combines the gradients of this pass, if they are to be."""
        if not self.synchronizing:
            return None
        if self._open is None:
            self._begin()
            if not self._ends_with_all:
                self._inner.begin()
                torch.autograd.Variable._execution_engine.queue_callback(self._ends)
        return self._open

    def _begin(self, *, active: bool = True) -> Sweep:
        """The first gradient of a pass that is to be combined.

        Args:
            active: it is one of this rank.
        """
        self._lane.check()
        self.everyone = self.uneven is None or (active and self.uneven.all_are_active())
        sweep = Sweep(self.passes, self._program, self._profiler.backward_begins())
        self.passes += 1
        self._open = self.latest = sweep
        self._landing.flying = True
        self._lane.begin(sweep)
        if self.lateness is not None:
            self.lateness.begins()
        for sibling in self.siblings:
            if sibling._open is None:
                sibling._begin()
        return sweep

    def _contribute(self, sweep: Sweep, member: Member, *, fresh: bool = False) -> None:
        copy = self._gradients.take(member, fresh=fresh)
        if copy is None:
            self._landing.hold_gradient(member, member.grad)
        else:
            if not fresh and has_alias(copy):
                self._aliased.append(member)
            self._landing.hold_copy(member, copy)
        self._arrived(sweep, member)

    def _lack(self, sweep: Sweep, member: Member) -> None:
        """Contributes zeros in the place of a gradient."""
        member.raw_grad.zero_()
        sweep.unused.add(member.order)
        self._landing.hold_gradient(member, member.grad)
        self._arrived(sweep, member)

    def _arrived(self, sweep: Sweep, member: Member) -> None:
        member.sweep = sweep
        sweep.record.ready[member.order] = sweep.record.now()
        buckets = self._program.buckets_of[member.order]
        self._lane.ready(sweep, buckets)
        if sweep.arrived(buckets):
            self._lane.advance()

    def _close(self, sweep: Sweep) -> None:
        """The pass is over: who got no gradient contributes what it has, or zeros."""
        ready, waited = sweep.record.ready, self._inner.end()
        late = [member for member in self._members if math.isnan(ready[member.order])]
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
        self._ended([member for member in late if id(member.parameter) not in waited])

    def _closed(self, sweep: Sweep) -> None:
        sweep.record.backward_ended = sweep.record.now()
        sweep.closed = True
        self._open = None
        self._lane.advance()
        if sweep.program.state is not None:
            sweep.program.state.count_users(sweep)
        if self.lateness is not None:
            self.lateness.ends()
        aliased, self._aliased = self._aliased, []
        for member in aliased:  # nobody can make those wait that lie over the same memory
            self._landing.settle(member)

    def contribute_nothing(self) -> None:
        """Takes part in a pass that only others have: no gradient changes here."""
        sweep = self._begin(active=False)
        for member in self._members:
            pending.land(member.parameter)
            self._landing.make_room(member)
            if member.parameter.grad is member.grad:
                self._landing.give_away(member)
            self._lack(sweep, member)
        self._closed(sweep)

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
        self._remove_hooks()
        for sibling in self.siblings:
            sibling.siblings.remove(self)


class Uneven(Protocol):
    """What is to be known while ranks may run out of input."""

    @property
    def enabled(self) -> bool:
        """Whether that may be now."""
        ...

    def all_are_active(self) -> bool:
        """Called by a rank that has input: whether all have; a collective call."""
        ...
