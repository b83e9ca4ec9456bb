"""A plan bound to a model's flat buffers: what a lane executes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from soonest.core.plan import SHARED_PARAMETERS, Plan
from soonest.runtime import comm
from soonest.runtime.comm import EXACT, Op, Piece, Ranks, Running, Wire
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.optim.bucket_update import Updater
from soonest.runtime.optim.shard import ParamShard, firsts_of, part_of
from soonest.runtime.optim.sharded_state import ShardedState

if TYPE_CHECKING:
    from soonest.runtime.execute.pass_state import PassState


_KEPT = 2.0**-12
"""Counts a rank that has only an earlier gradient: more than none, and less than any that used it,
however many there are."""


class BoundPlan:
    """A plan's ops and updates, ready to run.

    Args:
        plan: made for ``layout.flats``.
        layout: the buffers.
        ranks: over which to combine.
        updater: what to do once gradients are combined.
        state: of this rank's parts, if the plan shards.
        wire: how things are sent, where that is narrower than they are.

    Attributes:
        buckets_of: per parameter, the buckets that carry it, by index of ``layout.params``.
        last_of: per parameter, that one of them which the plan completes last.
        awaiting: per bucket, the parameters that can be updated as soon as it is combined.
        by_need: the buckets in the order in which the forward pass needs what awaits them.
        unfinished: passes through it.
    """

    def __init__(
        self,
        plan: Plan,
        layout: FlatBuffers,
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
        self.unfinished: set[PassState] = set()
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
        params = layout.params
        at = {(param.flat, param.slot.start): param.order for param in params}
        self.buckets_of: list[list[int]] = [[] for _ in params]
        self._params_in: list[list[FlatParam]] = []
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
            self._params_in.append([params[order] for order in inside])
            for order in inside:
                self.buckets_of[order].append(index)
        self.last_of = [max(buckets, key=position.__getitem__) for buckets in self.buckets_of]
        self.awaiting: list[list[FlatParam]] = [[] for _ in plan.buckets]
        for param in params:
            self.awaiting[self.last_of[param.order]].append(param)
        first = [min((m.order for m in waiting), default=len(params)) for waiting in self.awaiting]
        self.by_need = sorted(range(len(plan.buckets)), key=first.__getitem__)

    def memory(self) -> list[Tensor]:
        """All tensors that ops and updates use, apart from the optimizer's."""
        places = [marks.offsets for marks in (*self._counts, *self._firsts)]
        return [*(m.alias for m in self.layout.params), *self.layout.grads, *places]

    def issue(self, pass_state: PassState, op: int) -> Running:
        """Starts one op."""
        kind, bucket = self.plan.ops[op].kind, self.plan.ops[op].bucket
        if self.plan.before[op] < 0:
            self._count(pass_state, bucket)
            if self.plan.sharded:
                self._sign(pass_state, bucket)
        if kind == SHARED_PARAMETERS:
            return Running(self._gather(bucket))
        return Running(self._reduce(pass_state, op, kind, bucket))

    def _reduce(self, pass_state: PassState, op: int, kind: str, bucket: int) -> Op:
        yield from comm.op(kind, self._ranks, self._pieces[bucket])
        if op in self.plan.reduces:
            self.put_back(pass_state, bucket)

    def put_back(self, pass_state: PassState, bucket: int) -> None:
        """Gradients of parameters that no rank has used are each rank's own, as before the pass.

        Where ranks have only parts of gradients, the average of what they had stays.
        """
        if not pass_state.kept or self.plan.sharded:
            return
        with torch.no_grad():
            for param in self.awaiting[bucket]:
                if (own := pass_state.kept.get(param.order)) is not None:
                    # A device is not asked: it chooses by itself.
                    used = self._count_of(param) > 0.5
                    param.raw_grad.copy_(torch.where(used, param.raw_grad, own))

    def kept_in(self, pass_state: PassState, bucket: int) -> list[Tensor]:
        """What may be put back once this bucket is reduced."""
        kept = pass_state.kept
        return [kept[m.order] for m in self.awaiting[bucket] if m.order in kept] if kept else []

    def _gather(self, bucket: int) -> Op:
        """Gives every rank all parts of parameters, each from the rank that has updated it."""
        assert self.state is not None
        piece, start = self._pieces[bucket], self.plan.buckets[bucket].start
        with torch.no_grad():  # for lack of a place in which they lie one behind the other
            whole = torch.empty_like(piece.gradients)
            for shard in self.state.shards[bucket]:
                mine = shard.alias.detach() if shard.shown is None else shard.shown
                at = shard.param.slot.start + shard.start - start
                whole[at : at + mine.numel()] = mine
        yield from comm.op(SHARED_PARAMETERS, self._ranks, Piece(whole, whole, piece.wire))
        with torch.no_grad():
            for param in self._params_in[bucket]:
                first = max(start, param.slot.start)
                last = min(start + whole.numel(), param.slot.start + param.slot.numel)
                here = part_of(param, first - param.slot.start, last - param.slot.start)
                here.copy_(whole[first - start : last - start])

    def _count(self, pass_state: PassState, bucket: int) -> None:
        """Puts behind every gradient whether this rank has it."""
        marks = self._counts[bucket]
        offsets, params, _ = marks
        if params:
            gradients = self._pieces[bucket].gradients
            gradients.index_fill_(0, offsets, 1.0)
            for which, count in ((pass_state.unused, 0.0), (pass_state.kept.keys(), _KEPT)):
                if not which.isdisjoint(params):
                    _fill(gradients, marks, which, count)

    def _sign(self, pass_state: PassState, bucket: int) -> None:
        """Marks gradients that this rank does not have by negative zeros.

        A sum is negative zero only if all that is added is. So the owner of a part sees whether
        any rank had a gradient, though the count behind it may belong to another rank's part.
        """
        marks = self._firsts[bucket]
        offsets, params, _ = marks
        gradients = self._pieces[bucket].gradients
        gradients[offsets] += 0.0  # makes positive what happens to be negative zero
        if not pass_state.unused.isdisjoint(params):
            _fill(gradients, marks, pass_state.unused, -0.0)

    def update(self, pass_state: PassState, bucket: int) -> None:
        """Updates the parameters whose gradients this bucket completes, or this rank's parts."""
        if self.state is not None:
            shards = [s for s in self.state.shards[bucket] if self._wanted_part(pass_state, s)]
            if shards:
                self.updater.apply_shards(pass_state.step, shards, self.state.parts)
            return
        waiting = [m for m in self.awaiting[bucket] if self.wanted(pass_state, m)]
        if waiting:
            self.updater.apply(pass_state.step, waiting)

    def zero(self, pass_state: PassState, bucket: int) -> None:
        """Zeroes those gradients that the user has zeroed while they were in flight."""
        for param in self.awaiting[bucket]:
            if param.order in pass_state.step.zeroed:
                param.raw_grad.zero_()

    def wanted(self, pass_state: PassState, param: FlatParam) -> bool:
        """Whether the optimizer sees a gradient of this parameter."""
        if param.order not in pass_state.step.gradients:
            return False
        if pass_state.step.gradients[param.order] is not None:  # the user has made one
            return True
        return param.order not in pass_state.unused or self.used_anywhere(param)

    def _wanted_part(self, pass_state: PassState, shard: ParamShard) -> bool:
        """Whether the optimizer sees a gradient of this part of a parameter."""
        order = shard.param.order
        if order not in pass_state.step.gradients:
            return False
        if pass_state.step.gradients[order] is not None:
            return True
        if order not in pass_state.unused:
            return True
        if not shard.param.slot.numel:  # no element shows whether another rank has used it
            assert pass_state.users is not None
            return pass_state.users.has(order)
        return _positive(shard.raw_grad)

    def parts_with_gradient(self, pass_state: PassState) -> list[Tensor]:
        """This rank's parts of all gradients that any rank has."""
        assert self.state is not None
        return [
            shard.raw_grad
            for shards in self.state.shards
            for shard in shards
            if shard.param.order not in pass_state.unused or _positive(shard.raw_grad)
        ]

    def gather_gradients(self, pass_state: PassState) -> None:
        """Completes gradients of which this rank has only its parts; a collective call."""
        assert self.state is not None
        with self.state.together("reading gradients"):
            for piece in self._pieces:
                whole = Piece(piece.gradients, piece.gradients)
                comm.run(SHARED_PARAMETERS, self.state.ranks, whole)
        pass_state.whole = True

    def note_users(self, pass_state: PassState, *, together: bool) -> None:
        """Puts behind every gradient how many ranks have it, where gradients do not carry that.

        Args:
            pass_state: whose gradients.
            together: ranks tell each other, in a collective call; otherwise all have the same.
        """
        params = self.layout.params
        here = [
            _KEPT if m.order in pass_state.kept else float(m.order not in pass_state.unused)
            for m in params
        ]
        counts = torch.tensor(here, device=self.layout.grads[0].device)
        if together:
            comm.sum_small(self._ranks.group, counts)
        else:
            counts *= self._ranks.group.size()
        for param, count in zip(params, counts.tolist(), strict=True):
            self.layout.grads[param.flat][param.slot.count_at] = count

    def users_of(self, param: FlatParam) -> int:
        """In how many ranks' backward passes this parameter was used, once it is combined."""
        return round(float(self._count_of(param)))

    def used_anywhere(self, param: FlatParam) -> bool:
        """Whether any rank's pass gave this parameter a gradient, once it is combined."""
        pass_state = param.pass_state
        if self.state is not None and pass_state is not None and not pass_state.whole:
            return self.state.has_users(pass_state, param)
        return bool(self._count_of(param) > 0.5)

    def _count_of(self, param: FlatParam) -> Tensor:
        """What is behind the gradient, see ``_count``: from 0.5 on, a rank's pass has used it."""
        return self.layout.grads[param.flat][param.slot.count_at]


def _positive(gradient: Tensor) -> bool:
    """Whether a gradient does not begin with a negative zero, see ``BoundPlan._sign``."""
    first = gradient[:1]
    return not bool(((first == 0) & torch.signbit(first)).any())


class _Marks(NamedTuple):
    """Places in a bucket.

    Args:
        offsets: where, on the device.
        params: which they belong to.
        places: where, on the host.
    """

    offsets: Tensor
    params: list[int]
    places: list[int]


def _marks(marks: list[tuple[int, int]], device: torch.device) -> _Marks:
    places = [place for place, _ in marks]
    offsets = torch.tensor(places, dtype=torch.long, device=device)
    return _Marks(offsets, [param for _, param in marks], places)


def _fill(gradients: Tensor, marks: _Marks, which: Collection[int], value: float) -> None:
    """Writes to the places of some parameters, one by one: a device would have to be asked for a
    choice of offsets."""
    for param, place in zip(marks.params, marks.places, strict=True):
        if param in which:
            gradients[place].fill_(value)
