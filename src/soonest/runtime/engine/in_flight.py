"""What is in flight on this rank, and how it lands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from soonest.errors import SoonestError
from soonest.runtime.execute.bound_plan import Program
from soonest.runtime.execute.lane import Lane
from soonest.runtime.execute.pass_state import Sweep
from soonest.runtime.flat.buffers import Member
from soonest.runtime.guard import pending, transforms
from soonest.runtime.timing.profiler import Profiler


class _Part(NamedTuple):
    """A gradient of which ranks may have only their parts.

    Args:
        member: whose.
        sweep: has combined it.
        held: this rank has only its part, which nobody may read.
        copy: the user's own tensor that is still to be given the whole, if it is not the buffer's.
    """

    member: Member
    sweep: Sweep
    held: bool
    copy: Tensor | None


class Landing:
    """Holds the parameters and gradients of one program's members until they have their values.

    Args:
        program: whose members.
        lane: what brings them.
        hooks: needed while parameters are held.
        profiler: notes when each parameter is needed and when it is there.

    Attributes:
        flying: whether anything may be in flight.
        unknown: members that got no gradient on this rank, as long as it is not known whether
            another rank had one, and with it whether ``parameter.grad`` is None.
        copies: by order of the member, gradients of the user's own that still have to be given
            the combined values.
    """

    def __init__(
        self, program: Program, lane: Lane, hooks: pending.ModuleHooks, profiler: Profiler
    ) -> None:
        transforms.land_first()
        self._program = program
        self._lane = lane
        self._hooks = hooks
        self._profiler = profiler
        self._members = program.layout.members
        self._parameters = [
            pending.Hold(m.parameter, partial(self.land, m), set_grad=partial(self._know, m))
            for m in self._members
        ]
        self._gradients = [self._hold_of(m) for m in self._members]
        self._held: list[pending.Hold | None] = [None] * len(self._members)
        self.copies: dict[int, Tensor] = {}  # by order of the member
        self._awaited: set[int] = set()  # buckets
        self._zeroing: dict[int, Callable[[], None]] = {}  # by order of the member
        self.flying = False
        self.unknown: set[int] = set()

    def give_up(self) -> list[_Part]:
        """Holds nothing any more, nor keeps any tensor; nothing may be in flight.

        What it kept until the next full garbage collection would seem to be the user's.

        Returns:
            Gradients of which ranks have only their parts, also where this rank does not: all
            ranks have to agree on what there is to complete.
        """
        parts: list[_Part] = []
        for member, held in zip(self._members, self._held, strict=True):
            self._parameters[member.order].release()
            sweep, member.sweep = member.sweep, None  # it leads back to this one
            if sweep is None or sweep.whole:
                self._release_gradient(member)
                continue
            if held is not None:
                held.release()
            copy = self.copies.get(member.order)
            parts.append(_Part(member, sweep, held is not None, copy))
        self._parameters, self._gradients, self._held = [], [], []
        self.copies = {}
        return parts

    def hold_parts(self, parts: Sequence[_Part]) -> None:
        """Holds what another one has given up."""
        here = {id(member.parameter): member for member in self._members}
        for before, sweep, held, copy in parts:
            member = here.get(id(before.parameter))
            if member is None:
                continue
            if copy is not None:
                self.hold_copy(member, copy)
            elif held and member.grad is before.grad:
                self.hold_gradient(member, member.grad)
            member.sweep = sweep

    def watch(self) -> None:
        """Nothing is in flight, but note when each parameter is needed."""
        if self._profiler.record.closely:
            for member in self._members:
                self.hold(member)

    def hold(self, member: Member) -> None:
        """The parameter is to change; ``member.sweep`` is what will change it."""
        self._hooks.put()
        self._awaited.add(self._program.last_of[member.order])
        hold = self._parameters[member.order]
        hold.hides_grad = member.order in self.unknown
        hold.take_off()

    def _hold_of(self, member: Member) -> pending.Hold:
        return pending.Hold(member.grad, *self._ways(member, self._zero))

    def _ways(self, member: Member, zero: Callable[[Member], None]) -> tuple[partial[None], ...]:
        return partial(self.settle, member), partial(zero, member)

    def _know(self, member: Member) -> None:
        """The user says what its gradient is, whatever other ranks have."""
        self.unknown.discard(member.order)

    def hold_copy(self, member: Member, gradient: Tensor) -> None:
        """The user's own gradient gets the combined values once they are there."""
        self._hold(member, pending.Hold(gradient, *self._ways(member, self._forget_copy)))
        self.copies[member.order] = gradient

    def _forget_copy(self, member: Member) -> None:
        """The user zeroes a gradient that is still to get its value: it needs none."""
        gradient = self.copies.pop(member.order)
        self.hold_gradient(member, member.grad)  # what is sent is still under way
        with torch.no_grad(), pending.DisableGuard():
            gradient.zero_()

    def hold_gradient(self, member: Member, gradient: Tensor) -> None:
        """This gradient of the member is to change or still to be read."""
        before = self._held[member.order]
        if before is not None and before.tensor is gradient:
            return
        if gradient is member.grad:
            self._hold(member, self._gradients[member.order])
        else:
            self._hold(member, pending.Hold(gradient, partial(self.settle, member)))

    def _hold(self, member: Member, hold: pending.Hold) -> None:
        before = self._held[member.order]
        if before is not None:
            before.release()
        self._held[member.order] = hold
        hold.take_off()

    def expect(self, sweep: Sweep, gradients: Mapping[int, Tensor | None]) -> None:
        """A step is to change parameters.

        Args:
            sweep: will do it.
            gradients: that it uses, by order of the member.
        """
        for order, gradient in gradients.items():
            member = self._members[order]
            if gradient is not None and order in self.copies:
                self.settle(member)
            member.sweep = sweep
            self.hold(member)
            if order not in self.copies:
                self.hold_gradient(member, member.grad if gradient is None else gradient)
        if sweep.plan.sharded:  # gathering writes to all parameters, if only what is there
            for member in self._members:
                if member.order not in gradients:
                    member.sweep = sweep
                    self.hold(member)
        self.flying = True

    def _release_gradient(self, member: Member) -> None:
        held = self._held[member.order]
        if held is not None:
            held.release()
            self._held[member.order] = None
        copy = self.copies.pop(member.order, None)
        if copy is not None:
            with torch.no_grad(), pending.DisableGuard():
                copy.copy_(member.raw_grad)

    def settle(self, member: Member) -> None:
        """Waits until the member's gradient has its value, and nothing still reads it."""
        if self._held[member.order] is not None:
            self._wait_for_gradient(member)
            if self._partial(member):
                self._complete(member)
            self._release_gradient(member)

    def free(self, member: Member) -> None:
        """Waits until nothing writes to, or still reads, the member's gradient."""
        if self._held[member.order] is not None:
            self._wait_for_gradient(member)
            self._release_gradient(member)

    def complete_kept(self) -> None:
        """Completes gradients that a backward pass will add to, before it overwrites others.

        It is a collective call if there are any.
        """
        for member in self._members:
            if member.order in self.unknown:
                pending.land(member.parameter)
            with pending.DisableGuard():
                kept = member.parameter.grad is member.grad
            if kept and self._partial(member):
                self.settle(member)

    def make_room(self, member: Member) -> None:
        """Waits until the member's gradient can be written, or added to if it is still there."""
        with pending.DisableGuard():
            added_to = member.parameter.grad is member.grad
            if self._held[member.order] is not None:
                (self.settle if added_to or member.order in self.copies else self.free)(member)
            if added_to or not member.gradient_is_kept:
                return
        self.give_away(member)

    def give_away(self, member: Member) -> None:
        """The gradient in the buffer becomes the user's own; it has its value."""
        self._release_gradient(member)
        self._program.layout.give_away(member)
        self._gradients[member.order] = self._hold_of(member)

    def _partial(self, member: Member) -> bool:
        """Whether this rank has only its part of the member's gradient."""
        held, sweep = self._held[member.order], member.sweep
        if sweep is None or sweep.whole:
            return False
        if sweep.step is not None and member.order in sweep.step.zeroed:
            return False
        return held is not None and (held.tensor is member.grad or member.order in self.copies)

    def _complete(self, member: Member) -> None:
        """A gradient of which this rank has but a part is to be read."""
        sweep = member.sweep
        assert sweep is not None
        if sweep.step is not None:
            raise SoonestError(
                f"the gradient of {member.name!r} was read after optimizer.step(), but each rank "
                "has only its part of it, as shard_optimizer=True: read it before step(), on every "
                "rank, or clear gradients before the next backward pass"
            )
        for bucket in range(len(sweep.plan.buckets)):
            self._lane.wait(sweep, bucket, updated=False)
        sweep.program.gather_gradients(sweep)
        self._lane.spread()

    def complete_all(self) -> None:
        """Completes every gradient of which ranks have only their parts; a collective call.

        Nothing may be in flight.
        """
        parted = {m.sweep for m in self._members if m.sweep is not None and not m.sweep.whole}
        for sweep in sorted(parted, key=lambda sweep: sweep.number):
            with pending.DisableGuard(), torch.no_grad():
                here = [m for m in self._members if m.parameter.grad is m.grad]
                own = [(m, m.raw_grad.clone()) for m in here if not self._partial(m)]
                sweep.program.gather_gradients(sweep)
                for member, gradient in own:  # others may have only their parts of these
                    member.raw_grad.copy_(gradient)
        self._lane.spread()

    def land(self, member: Member) -> None:
        """Waits until the parameter has the value that the last ``step()`` gave it."""
        record, sweep = self._profiler.record, member.sweep
        needed = record.now()
        if self.flying:
            self._wait(member)
        if record.closely or sweep is None or sweep.step is None:
            self._landed(member)
        else:
            self._land_bucket(sweep, self._program.last_of[member.order])
        if math.isnan(record.needed[member.order]):
            record.needed[member.order] = needed
            record.landed[member.order] = record.now()

    def _land_bucket(self, sweep: Sweep, bucket: int) -> None:
        """What was updated together lands together: one look at a time costs more."""
        for member in self._program.awaiting[bucket]:
            if member.sweep is sweep:
                self._landed(member)
                self._parameters[member.order].release()
        self._awaited.discard(bucket)
        if not self._awaited:
            self._hooks.remove()

    def _landed(self, member: Member) -> None:
        if member.order in self.unknown:
            self._resolve(member)
        stepped = member.sweep is None or member.sweep.step is not None
        if stepped and member.order not in self._zeroing and not self._partial(member):
            self._release_gradient(member)

    def _wait(self, member: Member) -> None:
        sweep = member.sweep
        if sweep is None or sweep.program is not self._program:  # that of another one is over
            return
        if sweep.step is None and sweep.plan.sharded:  # ``last_of`` is the last to be shared
            for bucket in self._program.buckets_of[member.order]:
                self._lane.wait(sweep, bucket, updated=False)
            return
        last = self._program.last_of[member.order]
        self._lane.wait(sweep, last, updated=sweep.step is not None)

    def _wait_for_gradient(self, member: Member) -> None:
        self._wait(member)
        zeroed = self._zeroing.pop(member.order, None)
        if zeroed is not None:
            zeroed()

    def _resolve(self, member: Member) -> None:
        """Its gradient is combined: now it shows whether any rank had one."""
        self.unknown.discard(member.order)
        with pending.DisableGuard():
            if member.parameter.grad is None and self._program.used_anywhere(member):
                member.parameter.grad = member.grad

    def _zero(self, member: Member) -> None:
        """The user zeroes a gradient in flight: that happens when nobody needs it any more."""
        sweep = member.sweep
        assert sweep is not None
        zeroed = self._lane.zero(sweep, member)
        if zeroed is None:
            self.free(member)
            member.raw_grad.zero_()
        else:
            self._zeroing[member.order] = zeroed

    def all(self) -> None:
        """Everything has arrived: releases it all."""
        for member in self._members:
            if member.order in self.unknown:
                self._resolve(member)
        self.drop(parts=False)
        self.flying = False

    def drop(self, *, parts: bool = True) -> None:
        """Releases everything, whether it has arrived or not.

        Args:
            parts: also gradients of which this rank has only its part.
        """
        for member in self._members:
            self._parameters[member.order].release()
            if parts or not self._partial(member):
                self._release_gradient(member)
        self._awaited.clear()
        self._zeroing.clear()
        self._hooks.remove()
