"""One pass through a plan: the gradients of one backward pass, from ready to updated.

This is the pure state that a training loop's main thread and a lane share. It knows the rules of
the static order and nothing of tensors, threads or networks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from soonest.core.plan import SHARED_PARAMETERS, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from soonest.runtime.execute.bound_plan import BoundPlan
    from soonest.runtime.optim.usage import Users
    from soonest.runtime.timing.step_record import Record


class PassState:
    """The state of one pass.

    Args:
        number: counts the passes of a training run, from 0.
        bound_plan: what the lane executes.
        record: where the lane and the engine note what happened when.
        local: no gradients are sent; the pass only updates.

    Attributes:
        missing: per bucket, how many of its parameters have no gradient yet.
        unused: the parameters that have no gradient on this rank.
        kept: by order of the parameter, a copy of the earlier gradient of those to which this
            backward pass added nothing on this rank.
        issued: how many ops of the plan have been issued.
        combined: how many ops of the plan have been completed, in plan order.
        closed: the backward pass is over.
        step: what ``optimizer.step()`` was called with; None before.
        reduced: per bucket, whether its gradients are combined.
        shared: per bucket, whether this rank has updated its part; only where each updates one.
        updated: per bucket, whether the parameters that wait for it are updated.
        whole: this rank has all of the gradients, not only its parts.
        users: says which parameters any rank has used, where ranks have parts of the gradients.
    """

    def __init__(
        self, number: int, bound_plan: BoundPlan, record: Record, *, local: bool = False
    ) -> None:
        plan = bound_plan.plan
        self.number = number
        self.bound_plan = bound_plan
        self.record = record
        self.local = local
        self.missing = [0 if local else len(slots) for slots in plan.slots_of]
        self.unused: set[int] = set()
        self.kept: dict[int, Tensor] = {}
        self.issued = self.combined = plan.combining if local else 0
        self.closed = local
        self.step: Any = None
        self.superseded = False
        self.reduced = bytearray([local] * len(plan.buckets))
        self.shared = bytearray(len(plan.buckets))
        self.updated = bytearray(len(plan.buckets))
        self.whole = not plan.sharded
        self.users: Users | None = None

    @property
    def plan(self) -> Plan:
        return self.bound_plan.plan

    @property
    def in_flight(self) -> int:
        return self.issued - self.combined

    @property
    def ops(self) -> int:
        """How many ops of the plan are to be done: without an update there is nothing to share."""
        unused = self.superseded and self.step is None
        return self.plan.combining if unused else len(self.plan.ops)

    def arrived(self, buckets: Sequence[int]) -> bool:
        """Takes note of one more gradient.

        Args:
            buckets: those that carry it.

        Returns:
            Whether a bucket became complete.
        """
        complete = False
        for bucket in buckets:
            self.missing[bucket] -= 1
            assert self.missing[bucket] >= 0, self.plan.describe(bucket)
            complete |= not self.missing[bucket]
        return complete

    def next_op(self) -> int | None:
        """The op to issue now, if there is one.

        Ops are issued strictly in the plan's order, so that every rank issues the same sequence
        whatever its timing.
        """
        ops = self.plan.ops
        if self.issued >= self.ops or self.in_flight >= self.plan.window:
            return None
        if self.in_flight and ops[self.issued - 1].alone:
            return None
        op = ops[self.issued]
        if self.missing[op.bucket] or self.plan.before[self.issued] >= self.combined:
            return None
        if op.kind == SHARED_PARAMETERS and not self.shared[op.bucket]:
            return None
        return self.issued

    def complete_op(self) -> None:
        """The oldest op in flight is done."""
        op = self.plan.ops[self.combined]
        if op.kind == SHARED_PARAMETERS:
            self.bound_plan.zero(self, op.bucket)
            self.updated[op.bucket] = True
        elif self.combined in self.plan.reduces:
            self.reduced[op.bucket] = True
        self.combined += 1

    def complete_update(self, bucket: int) -> None:
        """The parameters that wait for a bucket are updated, or this rank's part of them."""
        if self.plan.sharded:
            self.shared[bucket] = True
        else:
            self.bound_plan.zero(self, bucket)
            self.updated[bucket] = True

    def next_update(self) -> int | None:
        """The bucket whose parameters to update now: of those that can be, the first needed."""
        if self.step is None:
            return None
        return next(self._updatable(), None)

    def _updatable(self) -> Iterator[int]:
        for bucket in self.bound_plan.by_need:
            if self.reduced[bucket] and not self.updated[bucket] and not self.shared[bucket]:
                yield bucket

    @property
    def owes(self) -> bool:
        """Whether other ranks wait for ops of this one, whatever happens to it here."""
        sent = self.plan.combining if self.step is None else self.ops
        return self.closed and self.combined < sent

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, or nothing that anybody still wants."""
        if self.combined < self.ops:
            return False
        return self.superseded if self.step is None else all(self.updated)


class PassStates:
    """Those that are not finished, in order.

    What others wait for is kept alive here. Apart from that, updates matter to nobody but those who
    may read the parameters, and so a pass lives as long as its bound plan does.
    """

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[PassState], ...] = ()  # replaced, never changed
        self._owing: tuple[PassState, ...] = ()

    def __iter__(self) -> Iterator[PassState]:
        return (pass_state for known in self._known if (pass_state := known()) is not None)

    def add(self, pass_state: PassState) -> None:
        for earlier in self:
            earlier.superseded = True
        self._known = (*self._known, weakref.ref(pass_state))
        pass_state.bound_plan.unfinished.add(pass_state)

    def first(self) -> PassState | None:
        """The first that is not finished."""
        for pass_state in self:
            if not pass_state.finished:
                return pass_state
            pass_state.bound_plan.unfinished.discard(pass_state)
            self._known = tuple(known for known in self._known if known() not in (None, pass_state))
        return None

    def note_owing(self) -> None:
        """To be called whenever one may have begun or ceased to owe others something."""
        self._owing = tuple(pass_state for pass_state in self if pass_state.owes)

    def clear(self) -> None:
        self._known = self._owing = ()


def place(plan: Plan, step: int, bucket: int, *, local: bool) -> str:
    """What is waited for, in words, as all ranks call it.

    Args:
        plan: of the pass.
        step: its number.
        bucket: of the plan.
        local: see ``PassState``.
    """
    how = ", for which there was no backward pass" if local else ""
    return f"step {step}{how}: {plan.describe(bucket)}"
