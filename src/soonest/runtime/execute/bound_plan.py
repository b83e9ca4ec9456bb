"""A plan bound to a model's flat buffers: what a lane executes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from soonest.core.plan import SHARED_PARAMETERS, Plan
from soonest.runtime import comm
from soonest.runtime.comm import EXACT, Op, Piece, Ranks, Running, Wire
from soonest.runtime.flat.buffers import Layout, Member
from soonest.runtime.optim.bucket_update import Updater
from soonest.runtime.optim.shard import Share, firsts_of, part_of
from soonest.runtime.optim.sharded_state import ShardedState

if TYPE_CHECKING:
    from soonest.runtime.execute.pass_state import Sweep


_KEPT = 2.0**-12
"""Counts a rank that has only an earlier gradient: more than none, and less than any that used it,
however many there are."""


class Program:
    """A plan's ops and updates, ready to run.

    Args:
        plan: made for ``layout.flats``.
        layout: the buffers.
        ranks: over which to combine.
        updater: what to do once gradients are combined.
        state: of this rank's parts, if the plan shards.
        wire: how things are sent, where that is narrower than they are.

    Attributes:
        buckets_of: per member, the buckets that carry it, by index of ``layout.members``.
        last_of: per member, that one of them which the plan completes last.
        awaiting: per bucket, the members that can be updated as soon as it is combined.
        by_need: the buckets in the order in which the forward pass needs what awaits them.
        unfinished: sweeps of it.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        ranks: Ranks,
        updater: Updater,
        *,
        state: ShardedState | None = None,
        wire: Wire = EXACT,
    ) -> None:
        assert plan.sharded == (state is not None)
        self.plan = plan
        self.layout = layout
        self.updater = updater
        self.unfinished: set[Sweep] = set()
        self._ranks = ranks
        self.state = state
        self._pieces = [
            Piece(
                layout.grads[bucket.flat][bucket.start : bucket.stop],
                layout.grads[bucket.flat][bucket.start : bucket.stop],
                wire.of(plan.flats[bucket.flat].itemsize),
            )
            for bucket in plan.buckets
        ]
        position = {op.bucket: index for index, op in enumerate(plan.ops)}
        members = layout.members
        at = {(member.flat, member.slot.start): member.order for member in members}
        self.buckets_of: list[list[int]] = [[] for _ in members]
        self._members_in: list[list[Member]] = []
        self._counts: list[_Marks] = []
        self._firsts: list[_Marks] = []
        for index, bucket in enumerate(plan.buckets):
            slots = [plan.flats[bucket.flat].slots[slot] for slot in plan.slots_of[index]]
            counted = [slot for slot in slots if bucket.start <= slot.count_at < bucket.stop]
            device = layout.grads[bucket.flat].device
            marks = [
                (slot.count_at - bucket.start, at[bucket.flat, slot.start]) for slot in counted
            ]
            self._counts.append(_marks(marks, device))
            firsts = firsts_of(plan, index) if plan.sharded else []
            marks = [(first - bucket.start, at[bucket.flat, slot]) for first, slot in firsts]
            self._firsts.append(_marks(marks, device))
            inside = [at[bucket.flat, slot.start] for slot in slots]
            self._members_in.append([members[order] for order in inside])
            for order in inside:
                self.buckets_of[order].append(index)
        self.last_of = [max(buckets, key=position.__getitem__) for buckets in self.buckets_of]
        self.awaiting: list[list[Member]] = [[] for _ in plan.buckets]
        for member in members:
            self.awaiting[self.last_of[member.order]].append(member)
        first = [min((m.order for m in waiting), default=len(members)) for waiting in self.awaiting]
        self.by_need = sorted(range(len(plan.buckets)), key=first.__getitem__)

    def memory(self) -> list[Tensor]:
        """All tensors that ops and updates use, apart from the optimizer's."""
        places = [marks.offsets for marks in (*self._counts, *self._firsts)]
        return [*(m.twin for m in self.layout.members), *self.layout.grads, *places]

    def issue(self, sweep: Sweep, op: int) -> Running:
        """Starts one op."""
        kind, bucket = self.plan.ops[op].kind, self.plan.ops[op].bucket
        if self.plan.before[op] < 0:
            self._count(sweep, bucket)
            if self.plan.sharded:
                self._sign(sweep, bucket)
        if kind == SHARED_PARAMETERS:
            return Running(self._gather(bucket))
        return comm.start(kind, self._ranks, self._pieces[bucket])

    def _gather(self, bucket: int) -> Op:
        """Gives every rank all parts of parameters, each from the rank that has updated it."""
        assert self.state is not None
        piece, start = self._pieces[bucket], self.plan.buckets[bucket].start
        with torch.no_grad():  # for lack of a place in which they lie one behind the other
            whole = torch.empty_like(piece.gradients)
            for share in self.state.shares[bucket]:
                mine = share.twin.detach() if share.shown is None else share.shown
                at = share.member.slot.start + share.start - start
                whole[at : at + mine.numel()] = mine
        yield from comm.op(SHARED_PARAMETERS, self._ranks, Piece(whole, whole, piece.wire))
        with torch.no_grad():
            for member in self._members_in[bucket]:
                first = max(start, member.slot.start)
                last = min(start + whole.numel(), member.slot.start + member.slot.numel)
                here = part_of(member, first - member.slot.start, last - member.slot.start)
                here.copy_(whole[first - start : last - start])

    def _count(self, sweep: Sweep, bucket: int) -> None:
        """Puts behind every gradient whether this rank has it."""
        marks = self._counts[bucket]
        offsets, members, _ = marks
        if members:
            gradients = self._pieces[bucket].gradients
            gradients.index_fill_(0, offsets, 1.0)
            for which, count in ((sweep.unused, 0.0), (sweep.kept, _KEPT)):
                if not which.isdisjoint(members):
                    _fill(gradients, marks, which, count)

    def _sign(self, sweep: Sweep, bucket: int) -> None:
        """Marks gradients that this rank does not have by negative zeros.

        A sum is negative zero only if all that is added is. So the owner of a part sees whether
        any rank had a gradient, though the count behind it may belong to another rank's part.
        """
        marks = self._firsts[bucket]
        offsets, members, _ = marks
        gradients = self._pieces[bucket].gradients
        gradients[offsets] += 0.0  # makes positive what happens to be negative zero
        if not sweep.unused.isdisjoint(members):
            _fill(gradients, marks, sweep.unused, -0.0)

    def update(self, sweep: Sweep, bucket: int) -> None:
        """Updates the parameters whose gradients this bucket completes, or this rank's parts."""
        if self.state is not None:
            shares = [s for s in self.state.shares[bucket] if self._wanted_part(sweep, s)]
            if shares:
                self.updater.apply_shares(sweep.step, shares, self.state.parts)
            return
        waiting = [m for m in self.awaiting[bucket] if self.wanted(sweep, m)]
        if waiting:
            self.updater.apply(sweep.step, waiting)

    def zero(self, sweep: Sweep, bucket: int) -> None:
        """Zeroes those gradients that the user has zeroed while they were in flight."""
        for member in self.awaiting[bucket]:
            if member.order in sweep.step.zeroed:
                member.raw_grad.zero_()

    def wanted(self, sweep: Sweep, member: Member) -> bool:
        """Whether the optimizer sees a gradient of this parameter."""
        if member.order not in sweep.step.gradients:
            return False
        if sweep.step.gradients[member.order] is not None:  # the user has made one
            return True
        return member.order not in sweep.unused or self.used_anywhere(member)

    def _wanted_part(self, sweep: Sweep, share: Share) -> bool:
        """Whether the optimizer sees a gradient of this part of a parameter."""
        order = share.member.order
        if order not in sweep.step.gradients:
            return False
        if sweep.step.gradients[order] is not None:
            return True
        if order not in sweep.unused:
            return True
        if not share.member.slot.numel:  # no element shows whether another rank has used it
            assert sweep.users is not None
            return sweep.users.has(order)
        return _positive(share.raw_grad)

    def parts_with_gradient(self, sweep: Sweep) -> list[Tensor]:
        """This rank's parts of all gradients that any rank has."""
        assert self.state is not None
        return [
            share.raw_grad
            for shares in self.state.shares
            for share in shares
            if share.member.order not in sweep.unused or _positive(share.raw_grad)
        ]

    def gather_gradients(self, sweep: Sweep) -> None:
        """Completes gradients of which this rank has only its parts; a collective call."""
        assert self.state is not None
        with self.state.together("reading gradients"):
            for piece in self._pieces:
                whole = Piece(piece.gradients, piece.gradients)
                comm.run(SHARED_PARAMETERS, self.state.ranks, whole)
        sweep.whole = True

    def note_users(self, sweep: Sweep, *, together: bool) -> None:
        """Puts behind every gradient how many ranks have it, where gradients do not carry that.

        Args:
            sweep: whose gradients.
            together: ranks tell each other, in a collective call; otherwise all have the same.
        """
        members = self.layout.members
        here = [
            _KEPT if m.order in sweep.kept else float(m.order not in sweep.unused) for m in members
        ]
        counts = torch.tensor(here, device=self.layout.grads[0].device)
        if together:
            comm.sum_small(self._ranks.group, counts)
        else:
            counts *= self._ranks.group.size()
        for member, count in zip(members, counts.tolist(), strict=True):
            self.layout.grads[member.flat][member.slot.count_at] = count

    def users_of(self, member: Member) -> int:
        """In how many ranks' backward passes this parameter was used, once it is combined."""
        return round(float(self.layout.grads[member.flat][member.slot.count_at]))

    def used_anywhere(self, member: Member) -> bool:
        """Whether any rank got a gradient for this parameter, once it is combined."""
        sweep = member.sweep
        if self.state is not None and sweep is not None and not sweep.whole:
            return self.state.has_users(sweep, member)
        return bool(self.layout.grads[member.flat][member.slot.count_at] > 0)


def _positive(gradient: Tensor) -> bool:
    """Whether a gradient does not begin with a negative zero, see ``Program._sign``."""
    first = gradient[:1]
    return not bool(((first == 0) & torch.signbit(first)).any())


class _Marks(NamedTuple):
    """Places in a bucket.

    Args:
        offsets: where, on the device.
        members: which they belong to.
        places: where, on the host.
    """

    offsets: Tensor
    members: list[int]
    places: list[int]


def _marks(marks: list[tuple[int, int]], device: torch.device) -> _Marks:
    places = [place for place, _ in marks]
    offsets = torch.tensor(places, dtype=torch.long, device=device)
    return _Marks(offsets, [member for _, member in marks], places)


def _fill(gradients: Tensor, marks: _Marks, which: set[int], value: float) -> None:
    """Writes to the places of some members, one by one: a device would have to be asked for a
    choice of offsets."""
    for member, place in zip(marks.members, marks.places, strict=True):
        if member in which:
            gradients[place].fill_(value)
