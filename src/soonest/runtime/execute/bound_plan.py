"""A plan bound to a model's flat buffers and optimizer: what a lane executes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soonest.core.plan import GATHER_PARAMETERS, Plan
from soonest.runtime import comm
from soonest.runtime.comm import EXACT, Op, Piece, Ranks, Running, Wire
from soonest.runtime.execute.usage_counts import UsageCounts, is_used_part
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.optim.bucket_update import Updater
from soonest.runtime.optim.shard import ParamShard, part_of
from soonest.runtime.optim.sharded_state import ShardedState

if TYPE_CHECKING:
    from soonest.runtime.execute.pass_state import PassState


class BoundPlan:
    """Runs the ops and updates of a plan, each when a lane says so.

    Args:
        plan: made for ``layout.flats``.
        layout: the flat buffers.
        ranks: over which gradients are reduced.
        updater: updates parameters once their gradients are reduced.
        state: the optimizer's state of this rank's parts; None if the plan does not shard.
        wire: the dtypes in which things are sent, where those are narrower than their own.

    Attributes:
        usage: how many ranks have used each parameter.
        buckets_of: per parameter, the buckets that carry it, by index of ``layout.params``.
        last_of: per parameter, that one of them which the plan completes last.
        awaiting: per bucket, the parameters that can be updated as soon as it is reduced.
        by_need: the buckets in the order in which the forward pass needs what awaits them.
        unfinished: the passes through this plan that are not finished.
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
        self.usage = UsageCounts(plan, layout, ranks.group, state)
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
        for index, bucket in enumerate(plan.buckets):
            slots = [plan.flats[bucket.flat].slots[slot] for slot in plan.slots_of[index]]
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

    def __repr__(self) -> str:
        plan = self.plan
        how = "sharded, " if plan.sharded else ""
        what = f"{how}{len(plan.buckets)} buckets, {len(plan.ops)} ops, {plan.ranks} ranks"
        return f"<BoundPlan {plan.fingerprint}: {what}, {len(self.unfinished)} unfinished passes>"

    def memory(self) -> list[Tensor]:
        """All tensors that ops and updates use, apart from the optimizer's own state."""
        aliases = [param.alias for param in self.layout.params]
        return [*aliases, *self.layout.grads, *self.usage.memory()]

    def issue(self, pass_state: PassState, op: int) -> Running:
        """Starts one op of the plan; what it returns goes on with it until it is done."""
        kind, bucket = self.plan.ops[op].kind, self.plan.ops[op].bucket
        if self.plan.before[op] < 0:
            self.usage.write(pass_state, bucket, self._pieces[bucket].gradients)
        if kind == GATHER_PARAMETERS:
            return Running(self._gather(bucket))
        return Running(self._reduce(pass_state, op, kind, bucket))

    def _reduce(self, pass_state: PassState, op: int, kind: str, bucket: int) -> Op:
        yield from comm.op(kind, self._ranks, self._pieces[bucket])
        if op in self.plan.reduces:
            self.put_back(pass_state, bucket)

    def put_back(self, pass_state: PassState, bucket: int) -> None:
        """Gives each rank back its own gradients of the parameters that no rank has used.

        Plain DDP leaves those as they were before the pass. Where ranks have only parts of
        gradients, the average of what they had stays.
        """
        if not pass_state.kept or self.plan.sharded:
            return
        with torch.no_grad():
            for param in self.awaiting[bucket]:
                if (own := pass_state.kept.get(param.order)) is not None:
                    # A device is not asked: it chooses by itself.
                    used = self.usage.is_used(param)
                    param.raw_grad.copy_(torch.where(used, param.raw_grad, own))

    def kept_in(self, pass_state: PassState, bucket: int) -> list[Tensor]:
        """The earlier gradients that may be put back once this bucket is reduced."""
        kept = pass_state.kept
        return [kept[m.order] for m in self.awaiting[bucket] if m.order in kept] if kept else []

    def _gather(self, bucket: int) -> Op:
        """Gives every rank all parts of parameters, each from the rank that has updated it."""
        assert self.state is not None
        piece, start = self._pieces[bucket], self.plan.buckets[bucket].start
        with torch.no_grad():  # parameters stay where the user made them, so they are copied
            whole = torch.empty_like(piece.gradients)
            for shard in self.state.shards[bucket]:
                mine = shard.alias.detach() if shard.shown is None else shard.shown
                at = shard.param.slot.start + shard.start - start
                whole[at : at + mine.numel()] = mine
        yield from comm.op(GATHER_PARAMETERS, self._ranks, Piece(whole, whole, piece.wire))
        with torch.no_grad():
            for param in self._params_in[bucket]:
                first = max(start, param.slot.start)
                last = min(start + whole.numel(), param.slot.start + param.slot.numel)
                here = part_of(param, first - param.slot.start, last - param.slot.start)
                here.copy_(whole[first - start : last - start])

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

    def complete_op(self, pass_state: PassState) -> None:
        """Lets the state of a pass know that its oldest op in flight is done."""
        op = self.plan.ops[pass_state.completed]
        if op.kind == GATHER_PARAMETERS:
            self._zero(pass_state, op.bucket)
        pass_state.complete_op()

    def complete_update(self, pass_state: PassState, bucket: int) -> None:
        """Lets the state of a pass know that a bucket's update is done."""
        if not self.plan.sharded:
            self._zero(pass_state, bucket)
        pass_state.complete_update(bucket)

    def _zero(self, pass_state: PassState, bucket: int) -> None:
        """Zeroes those gradients that the user has zeroed while they were in flight.

        This comes before the state says that the parameters have their values: whoever waits for
        that looks without a lock, and may read the gradients right then.
        """
        for param in self.awaiting[bucket]:
            if param.order in pass_state.step.zeroed:
                param.raw_grad.zero_()

    def wanted(self, pass_state: PassState, param: FlatParam) -> bool:
        """Whether the optimizer sees a gradient of this parameter."""
        if param.order not in pass_state.step.gradients:
            return False
        if pass_state.step.gradients[param.order] is not None:  # the user has made one
            return True
        return param.order not in pass_state.unused or self.usage.used_anywhere(param)

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
        return is_used_part(shard.raw_grad)

    def parts_with_gradient(self, pass_state: PassState) -> list[Tensor]:
        """This rank's parts of all gradients that any rank has."""
        assert self.state is not None
        return [
            shard.raw_grad
            for shards in self.state.shards
            for shard in shards
            if shard.param.order not in pass_state.unused or is_used_part(shard.raw_grad)
        ]

    def gather_gradients(self, pass_state: PassState) -> None:
        """Completes gradients of which this rank has only its parts; a collective call."""
        assert self.state is not None
        with self.state.together("reading gradients"):
            for piece in self._pieces:
                whole = Piece(piece.gradients, piece.gradients)
                comm.run(GATHER_PARAMETERS, self.state.ranks, whole)
        pass_state.whole = True
