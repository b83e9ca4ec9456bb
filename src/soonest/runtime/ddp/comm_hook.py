"""Communication hooks: the user's own function reduces the gradients of each bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from soonest.errors import ReadTooEarlyError, SoonestError
from soonest.runtime.execute.pass_state import REDUCED, PassState
from soonest.runtime.flat.param import FlatParam

Hook = Callable[[Any, Any], "torch.futures.Future[Any]"]


class GradBucket:
    """A bucket as hooks get it: as ``torch.distributed.GradBucket``, which has no constructor.

    Args:
        index: of the bucket, in the order in which hooks are called.
        params: whose gradients are in it.
        is_last: whether no other follows in this backward pass.
    """

    def __init__(self, index: int, params: Sequence[FlatParam], *, is_last: bool) -> None:
        self._index = index
        self._params = params
        self._is_last = is_last
        self._buffer = torch.cat([param.raw_grad.reshape(-1) for param in params])

    def __repr__(self) -> str:
        first, last = self._params[0].name, self._params[-1].name
        return f"GradBucket({self._index}: {first} … {last})"

    def index(self) -> int:
        return self._index

    def buffer(self) -> Tensor:
        """All gradients in one row, not divided by the number of ranks."""
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
        """Splits a row of the buffer's size into the shapes of the gradients."""
        parts = row.view(-1).split([param.raw_grad.numel() for param in self._params])
        return [
            part.view(param.raw_grad.shape) for part, param in zip(parts, self._params, strict=True)
        ]

    def take(self, answer: Any) -> None:
        """Overwrites the gradients by the value of a hook's future."""
        row = answer[0] if isinstance(answer, list | tuple) else answer
        for param, part in zip(self._params, self.shaped(row), strict=True):
            param.raw_grad.copy_(part)


class _Called(NamedTuple):
    """A call of the hook, and the future that it has returned."""

    bucket: GradBucket
    answer: torch.futures.Future[Any]


class HookLane:
    """A lane without threads: the backward pass itself calls the hook, bucket by bucket.

    So the hook's collectives come in the same order as the user's others, and all its results are
    there when the backward pass ends. The plan's buckets must hold whole parameters, and the order
    of its ops is that of the calls.

    Args:
        hook: the user's, as for ``DistributedDataParallel.register_comm_hook``.
        state: its first argument.
        counting: ranks may differ in which parameters they use, and so tell each other.
    """

    def __init__(self, hook: Hook, state: Any, *, counting: bool) -> None:
        self._hook = hook
        self._state = state
        self._counting = counting
        self._pass_state: PassState | None = None
        self._called: list[_Called] = []

    error: SoonestError | None = None
    clock = None

    def __repr__(self) -> str:
        name = getattr(self._hook, "__qualname__", repr(self._hook))
        return f"HookLane({name}, {len(self._called)} calls under way)"

    def begin(self, pass_state: PassState) -> None:
        self._pass_state = pass_state
        self._called = []

    def enter(self) -> None: ...

    def ready(self, pass_state: PassState, buckets: Sequence[int]) -> None: ...

    def zero(self, pass_state: PassState, param: FlatParam) -> None:
        """Does nothing: no update is ever under way."""

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
        pass_state.issue_op()

    def _answer(self, pass_state: PassState) -> None:
        """Waits for all futures, as ``DistributedDataParallel`` does at the end of a pass."""
        with torch.no_grad():
            for op, (bucket, answer) in enumerate(self._called):
                bucket.take(answer.wait())
                pass_state.record.op_ended(op)
                pass_state.complete_op()
            self._called = []
            pass_state.bound_plan.usage.write_sums(pass_state, ranks_differ=self._counting)
            for bucket in range(len(pass_state.plan.buckets)):
                pass_state.bound_plan.put_back(pass_state, bucket)

    def wait(self, pass_state: PassState, bucket: int, *, updated: bool) -> None:
        if pass_state.states[bucket] < REDUCED:
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
