"""Gradients that a communication hook of the user's combines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]

from soonest.core.plan import METHODS, Bucket, Flat, Op, Plan
from soonest.errors import ReadTooEarlyError, SoonestError
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.flat.buffers import flats_for
from soonest.runtime.flat.param import FlatParam

Hook = Callable[[Any, Any], "torch.futures.Future[Any]"]


class GradBucket:
    """What a hook is given: it answers as ``torch.distributed.GradBucket``, which none can build.

    Args:
        index: of the bucket, in the order in which hooks are called.
        params: whose gradients it holds.
        is_last: whether no other follows in this backward pass.
    """

    def __init__(self, index: int, params: Sequence[FlatParam], *, is_last: bool) -> None:
        self._index = index
        self._params = params
        self._is_last = is_last
        self._buffer = torch.cat([param.raw_grad.reshape(-1) for param in params])

    def index(self) -> int:
        return self._index

    def buffer(self) -> Tensor:
        """All gradients in one row; not divided by the number of ranks."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def gradients(self) -> list[Tensor]:
        """Each gradient by itself, as a view of ``buffer()``."""
        return self.shaped(self._buffer)

    def parameters(self) -> list[nn.Parameter]:
        return [param.parameter for param in self._params]

    def is_last(self) -> bool:
        return self._is_last

    def shaped(self, row: Tensor) -> list[Tensor]:
        """The parts of a row of the buffer's size in the shapes of the gradients."""
        parts = row.view(-1).split([param.raw_grad.numel() for param in self._params])
        return [
            part.view(param.raw_grad.shape) for part, param in zip(parts, self._params, strict=True)
        ]

    def take(self, answer: Any) -> None:
        """Puts what a hook's future holds in the place of the gradients."""
        row = answer[0] if isinstance(answer, list | tuple) else answer
        for param, part in zip(self._params, self.shaped(row), strict=True):
            param.raw_grad.copy_(part)


class _Called(NamedTuple):
    bucket: GradBucket
    answer: torch.futures.Future[Any]


class HookLane:
    """A lane without threads: the backward pass itself calls the hook, bucket after bucket.

    So its collectives come in the same order as the user's others, and all its answers are there
    when the backward pass ends. The plan's buckets must hold whole parameters, and its order is
    that of the calls.

    Args:
        hook: the user's, as for ``DistributedDataParallel.register_comm_hook``.
        state: its first argument.
        counting: whether ranks may differ in which parameters they use, so that they tell each
            other. Otherwise all use the same.
    """

    def __init__(self, hook: Hook, state: Any, *, counting: bool) -> None:
        self._hook = hook
        self._state = state
        self._counting = counting
        self._pass_state: PassState | None = None
        self._called: list[_Called] = []

    error: SoonestError | None = None
    clock = None

    def begin(self, pass_state: PassState) -> None:
        self._pass_state = pass_state
        self._called = []

    def enter(self) -> None: ...

    def ready(self, pass_state: PassState, buckets: Sequence[int]) -> None: ...

    def zero(self, pass_state: PassState, param: FlatParam) -> None:
        """No update is ever under way."""

    def advance(self) -> None:
        pass_state = self._pass_state
        if pass_state is None:
            return
        with torch._C.DisableTorchFunctionSubclass():
            while (op := pass_state.next_op()) is not None:
                self._call(pass_state, op)
            if pass_state.closed and self._called:
                self._answer(pass_state)

    def _call(self, pass_state: PassState, op: int) -> None:
        pass_state.record.op_started(op)
        params = pass_state.bound_plan.awaiting[pass_state.plan.ops[op].bucket]
        bucket = GradBucket(op, params, is_last=op == len(pass_state.plan.ops) - 1)
        self._called.append(_Called(bucket, self._hook(self._state, bucket)))
        pass_state.issued += 1

    def _answer(self, pass_state: PassState) -> None:
        """Waits for all futures, as ``DistributedDataParallel`` does at the end of a pass."""
        with torch.no_grad():
            for op, (bucket, answer) in enumerate(self._called):
                bucket.take(answer.wait())
                pass_state.record.op_ended(op)
                pass_state.complete_op()
            self._called = []
            pass_state.bound_plan.note_users(pass_state, together=self._counting)
            for bucket in range(len(pass_state.plan.buckets)):
                pass_state.bound_plan.put_back(pass_state, bucket)

    def wait(self, pass_state: PassState, bucket: int, *, updated: bool) -> None:
        if not pass_state.reduced[bucket]:
            raise ReadTooEarlyError(
                f"a gradient was read inside backward pass {pass_state.number}, before the "
                "communication hook was called: read it after backward()"
            )

    def wait_all(self) -> None: ...

    def waits_for(self, limit_s: float) -> None: ...

    def spread(self, used: Iterable[Tensor] = ()) -> None: ...

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def fail(self, error: Exception) -> None:
        self.error = error if isinstance(error, SoonestError) else SoonestError(str(error))

    def close(self) -> None:
        self._pass_state = None


_CAP_BYTES = 25 << 20
"""DDP's own default."""


def whole_plan(
    named: Sequence[tuple[str, str, nn.Parameter]],
    *,
    ranks: int,
    caps_bytes: Sequence[int] = (),
    window: int | None = None,
) -> Plan:
    """A plan with the buckets that ``DistributedDataParallel`` makes, of whole parameters.

    Args:
        named: what ``trainable`` gave.
        ranks: how many.
        caps_bytes: bytes of gradients from which each bucket is closed; the last one stays. DDP's
            own default if there are none.
        window: how many ops may be in flight; all of them if None.
    """
    for name, _, parameter in named:
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, and neither buckets of a given size nor "
                "communication hooks can have complex ones here: leave out both"
            )
    flats = flats_for(named)
    limits = list(caps_bytes) or [_CAP_BYTES]
    found, _ = _distributed_c10d._compute_bucket_assignment_by_size(
        [p for _, _, p in named], limits
    )
    at = {slot.name: (index, slot) for index, flat in enumerate(flats) for slot in flat.slots}
    sent: list[Bucket] = []
    for indices in reversed(found):
        places = [at[named[index][0]] for index in indices]
        flat, first = places[0]
        stop = _end(flats[flat], places[-1][1].start)
        layers = tuple(dict.fromkeys(slot.layer for _, slot in places))
        sent.append(Bucket(flat, first.start, stop, "allreduce", layers))
    buckets = sorted(sent, key=lambda bucket: (bucket.flat, bucket.start))
    (kind,) = METHODS["allreduce"]
    ops = tuple(Op(buckets.index(bucket), kind) for bucket in sent)
    return Plan(ranks, flats, tuple(buckets), ops, window or len(ops))


def _end(flat: Flat, start: int) -> int:
    """Where the slot ends that starts here, with the gap behind it."""
    starts = [slot.start for slot in flat.slots]
    return [*starts[1:], flat.numel][starts.index(start)]
