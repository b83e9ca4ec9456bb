"""One trainable parameter, and where its gradient lies in the flat buffers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from soonest.core.plan import Slot
from soonest.errors import SoonestError
from soonest.runtime.flat.storage import FROM_PYTHON, references

if TYPE_CHECKING:
    from soonest.runtime.execute.pass_state import PassState

_OWN_VIEWS = 2 + FROM_PYTHON
"""References to a gradient's storage that are the engine's: ``FlatParam.grad`` and ``raw_grad``."""
_OWN_NAMES = 3
"""References to ``FlatParam.grad`` that are the engine's: the field, that of its ``PendingTensor``,
and the one that the call counting them holds."""


@dataclass(eq=False, slots=True, repr=False)
class FlatParam:
    """One trainable parameter, and the place of its gradient in the flat buffers.

    Args:
        name: as in ``model.named_parameters()``.
        layer: name of the module that owns it.
        parameter: the user's own object, in the user's own memory.
        order: its rank in the order of first use.
        flat: index of its flat buffer.
        slot: its place there.
        grad: view of the gradient buffer that becomes ``parameter.grad``; it may be pending.
        raw_grad: a second tensor over the same memory, which only the engine sees and which is
            never pending.
        alias: a second tensor over the memory of ``parameter``, sharing its version counter. The
            lane updates it while ``parameter`` is pending: one tensor cannot be both guarded from
            the user and open to the optimizer.
        address, shape, strides: where that memory was when it was last looked at, and which part.
        grad_address, grad_storage: data pointer and storage of ``grad`` when last looked at.
        is_exposed: others may read or write that memory without a tensor of this process.
        storage: the storage of ``parameter``, as the ``_cdata`` by which torch counts references.
        references: how many there are to it if nobody else has a tensor over the same memory.
        extra: tensors over the parameter's memory that the engine has besides ``alias``.
        pass_state: the last backward pass whose gradient was or is being reduced.
    """

    name: str
    layer: str
    parameter: nn.Parameter
    order: int
    flat: int
    slot: Slot
    grad: Tensor
    raw_grad: Tensor
    alias: nn.Parameter
    address: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    grad_address: int = 0
    grad_storage: int = 0
    is_exposed: bool = False
    storage: int = 0
    references: int = 0
    extra: int = 0
    pass_state: PassState | None = field(default=None)

    def __repr__(self) -> str:
        stop = self.slot.start + self.slot.numel
        return f"FlatParam({self.name}, buffer {self.flat}[{self.slot.start}:{stop}])"

    @property
    def is_aliased(self) -> bool:
        """Whether another tensor or process shares its memory, which the guard cannot see."""
        return self.is_exposed or references(self.storage) > self.references

    @property
    def has_moved(self) -> bool:
        """Whether the user has given the parameter other memory, or another part or order of it."""
        now = self.parameter
        return (
            now.data_ptr() != self.address
            or now.stride() != self.strides
            or now.shape != self.shape
        )

    def note_gradient(self) -> None:
        """Remembers where the gradient in the buffer is now."""
        self.grad_address = self.raw_grad.data_ptr()
        self.grad_storage = self.raw_grad.untyped_storage()._cdata

    @property
    def gradient_is_kept(self) -> bool:
        """Whether the user still has the gradient that was last in the buffer, or a view of it.

        Or it lies elsewhere by now, as the user has given it other memory.
        """
        return (
            sys.getrefcount(self.grad) > _OWN_NAMES
            or self.grad.data_ptr() != self.grad_address
            or references(self.grad_storage) > _OWN_VIEWS
        )


def changed(param: FlatParam) -> SoonestError:
    """The error for a parameter that no longer has the dtype, shape or device of its slot."""
    now, before = param.parameter, param.raw_grad
    return SoonestError(
        f"parameter {param.name!r} is {_described(now)} now, but was {_described(before)} when "
        "prioritize was called, and its gradients can only be reduced as such: detach() the "
        "handle, change the model, and call prioritize again, on every rank"
    )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"
