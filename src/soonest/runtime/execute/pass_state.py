"""The state of one pass through a plan: the gradients of one backward pass, from ready to updated.

A training loop's main thread and its lane share this state. It knows the rules of the static order
and nothing of tensors, threads or networks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any

from soonest.core.plan import GATHER_PARAMETERS, Plan
from soonest.errors import SoonestError

if TYPE_CHECKING:
    from torch import Tensor

    from soonest.runtime.execute.bound_plan import BoundPlan
    from soonest.runtime.optim.usage import Users
    from soonest.runtime.timing.step_record import Record


class BucketState(IntEnum):
    """How far a bucket is in one pass. It goes from each state to the next, and skips none."""

    WAITING = 0
    """At least one of its parameters has no gradient on this rank yet."""
    READY = 1
    """All of its gradients are there; none of its ops is issued."""
    REDUCING = 2
    """Its first op is issued; its gradients belong to the lane."""
    REDUCED = 3
    """Its gradients are the average over all ranks; with a sharded plan, in this rank's part."""
    UPDATED = 4
    """The parameters that wait for it are updated; with a sharded plan, this rank's part of it."""
    GATHERED = 5
    """Only with a sharded plan: the parts that the other ranks have updated are here, too."""


# A name of a module is read in a tenth of the time that a member of an Enum takes.
WAITING, READY, REDUCING, REDUCED, UPDATED, GATHERED = BucketState

_EVENTS = 20
"""How many transitions a pass remembers, to tell them when something goes wrong."""


class PassState:
    """The state of one pass.

    Threads read ``states`` without a lock: each change is one assignment, made when all that the
    new state promises is done.

    Args:
        number: counts the passes of a training run, from 0.
        bound_plan: what the lane executes. Its plan and order of need are all that counts here.
        record: where the lane and the engine note what happened when.
        local: the gradients are not sent, as there was no backward pass: they count as reduced,
            and only the updates are to be done.

    Attributes:
        plan: of the pass.
        states: per bucket, how far it is.
        final: the state in which the parameters that wait for a bucket have their values.
        unused: the parameters that have no gradient on this rank.
        kept: by order of the parameter, a copy of the earlier gradient of those to which this
            backward pass added nothing on this rank.
        issued: how many ops of the plan have been issued.
        completed: how many ops of the plan have been completed, in plan order.
        closed: the backward pass is over.
        step: what ``optimizer.step()`` was called with; None before.
        superseded: a later pass has begun, so that no ``step()`` can come any more.
        whole: this rank has all of the gradients, not only its parts.
        users: says which parameters any rank has used, where ranks have parts of the gradients.
    """

    def __init__(
        self, number: int, bound_plan: BoundPlan, record: Record, *, local: bool = False
    ) -> None:
        self.number = number
        self.bound_plan = bound_plan
        self.plan: Plan = bound_plan.plan
        self.record = record
        self.local = local
        self.final = GATHERED if self.plan.sharded else UPDATED
        self._missing = [0 if local else len(slots) for slots in self.plan.slots_of]
        ready = REDUCED if local else READY
        self.states = [WAITING if missing else ready for missing in self._missing]
        self._left = len(self.states)  # buckets that are not in their final state
        self._events: deque[tuple[int, BucketState]] = deque(maxlen=_EVENTS)
        self.unused: set[int] = set()
        self.kept: dict[int, Tensor] = {}
        self.issued = self.completed = self.plan.reducing if local else 0
        self.closed = local
        self.step: Any = None
        self.superseded = False
        self.whole = not self.plan.sharded
        self.users: Users | None = None

    @property
    def in_flight(self) -> int:
        return self.issued - self.completed

    @property
    def ops(self) -> int:
        """How many ops of the plan are to be done: without an update, nothing is gathered."""
        unwanted = self.superseded and self.step is None
        return self.plan.reducing if unwanted else len(self.plan.ops)

    # From state to state

    def arrived(self, buckets: Sequence[int]) -> bool:
        """Takes note of one more gradient.

        Args:
            buckets: those that carry it.

        Returns:
            Whether a bucket became ready.
        """
        complete = False
        missing = self._missing
        for bucket in buckets:
            missing[bucket] -= 1
            if missing[bucket] <= 0:
                self._move(bucket, READY)
                complete = True
        return complete

    def next_op(self) -> int | None:
        """The op to issue now, if there is one.

        Ops are issued strictly in the plan's order, so that every rank issues the same sequence
        whatever its timing.
        """
        plan, issued, completed = self.plan, self.issued, self.completed
        in_flight = issued - completed
        if issued >= self.ops or in_flight >= plan.window:
            return None
        if in_flight and plan.ops[issued - 1].alone:
            return None
        op = plan.ops[issued]
        state = self.states[op.bucket]
        if state < READY or plan.before[issued] >= completed:
            return None
        if state < UPDATED and op.kind == GATHER_PARAMETERS:
            return None
        return issued

    def issue_op(self) -> None:
        """The op that ``next_op`` gave is issued."""
        if self.plan.before[self.issued] < 0:
            self._move(self.plan.ops[self.issued].bucket, REDUCING)
        self.issued += 1

    def complete_op(self) -> None:
        """The oldest op in flight is done."""
        op = self.plan.ops[self.completed]
        if op.kind == GATHER_PARAMETERS:
            self._move(op.bucket, GATHERED)
        elif self.completed in self.plan.reduces:
            self._move(op.bucket, REDUCED)
        self.completed += 1

    def complete_update(self, bucket: int) -> None:
        """The parameters that wait for a bucket are updated, or this rank's part of the bucket."""
        self._move(bucket, UPDATED)

    def _move(self, bucket: int, to: BucketState) -> None:
        """The one way from a state to the next.

        Raises:
            SoonestError: it is not the next one; the message tells what has happened before.
        """
        if to != self.states[bucket] + 1 or to > self.final:
            raise self._illegal(bucket, to)
        self._events.append((bucket, to))
        self.states[bucket] = to
        if to is self.final:
            self._left -= 1

    def _illegal(self, bucket: int, to: BucketState) -> SoonestError:
        events = [
            f"{BucketState(new - 1).name} to {new.name} (bucket {of})"
            for of, new in self._events.copy()
        ]
        return SoonestError(
            f"step {self.number}: {self.plan.describe(bucket)} cannot go from "
            f"{self.states[bucket].name} to {to.name}. This is a mistake in soonest: please report "
            f"it with this message. Until now: {', '.join(events) or 'nothing'}. It is {self!r}"
        )

    # What there is to do

    def next_update(self) -> int | None:
        """The bucket whose parameters to update now: of those that can be, the first needed."""
        if self.step is None:
            return None
        states = self.states
        for bucket in self.bound_plan.by_need:
            if states[bucket] is REDUCED:
                return bucket
        return None

    @property
    def owes(self) -> bool:
        """Whether other ranks wait for ops of this one, whatever happens to it here."""
        sent = self.plan.reducing if self.step is None else self.ops
        return self.closed and self.completed < sent

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, or nothing that anybody still wants."""
        if self.completed < self.ops:
            return False
        return self.superseded if self.step is None else not self._left

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do until the training loop goes on."""
        if self.step is None and self.completed >= self.plan.reducing:
            return True
        return self.finished or not self.closed

    # In words

    def place(self, bucket: int | None = None) -> str:
        """What is waited for, in words: a bucket, by default that of the next op to complete."""
        if bucket is None:
            bucket = self.plan.ops[min(self.completed, len(self.plan.ops) - 1)].bucket
        return place(self.plan, self.number, bucket, local=self.local)

    def where(self) -> str:
        """Where in this step the training loop is, in words."""
        if not self.closed:
            return f"in the backward pass of step {self.number}"
        if self.step is None:
            return f"between the backward pass and optimizer.step() of step {self.number}"
        return f"behind optimizer.step() of step {self.number}"

    def __repr__(self) -> str:
        runs: list[str] = []
        for state, group in groupby(range(len(self.states)), self.states.__getitem__):
            first, *more = group
            runs.append(f"{first}{f'-{more[-1]}' if more else ''} {state.name}")
        return (
            f"<PassState: step {self.number}, of {len(self.plan.ops)} ops {self.issued} issued and "
            f"{self.completed} completed, buckets {', '.join(runs)}>"
        )

    def validate(self) -> None:
        """Raises AssertionError if counts and states contradict each other; for tests."""
        plan = self.plan
        assert 0 <= self.completed <= self.issued <= len(plan.ops), self
        assert self.in_flight <= plan.window, self
        for bucket, (state, missing) in enumerate(zip(self.states, self._missing, strict=True)):
            assert missing >= 0, self
            assert (state is WAITING) == (missing > 0), self
            assert state <= self.final, self
            assert state < UPDATED or self.step is not None, self
            numbers = [number for number, op in enumerate(plan.ops) if op.bucket == bucket]
            reducing = [number for number in numbers if plan.ops[number].kind != GATHER_PARAMETERS]
            assert (state >= REDUCING) == (self.issued > reducing[0]), self
            assert (state >= REDUCED) == (self.completed > reducing[-1]), self
            if plan.sharded:
                assert state >= UPDATED or self.issued <= numbers[-1], self
                assert (state is GATHERED) == (self.completed > numbers[-1]), self
        assert self._left == sum(state < self.final for state in self.states), self


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
