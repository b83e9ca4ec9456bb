"""Where parameters and gradients lie: parameters where the user made them, gradients in flat
buffers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import is_non_overlapping_and_dense_or_false

from soonest.core.plan import Flat, Slot
from soonest.errors import SoonestError

if TYPE_CHECKING:
    from soonest.runtime.execute.pass_state import PassState


@dataclass(eq=False, slots=True)
class FlatParam:
    """One trainable parameter, and the place of its gradient in the flat buffers.

    Args:
        name: as in ``model.named_parameters()``.
        layer: name of the module that owns it.
        parameter: the user's own object, in the user's own memory.
        order: its rank in the order of first use.
        flat: index of its flat buffer.
        slot: its place there.
        grad: view of the gradient buffer that becomes ``parameter.grad``; it may be held.
        raw_grad: the same memory as a tensor that only the engine sees; it is never held.
        alias: the same memory as ``parameter``, sharing its version counter; what the optimizer
            updates, so that an update never meets the guard.
        address, shape, strides: where that memory was when it was last looked at, and which part.
        grad_address, grad_storage: where that of the gradient is, and what stands for it.
        is_exposed: others may read or write that memory without a tensor of this process.
        storage: what stands for that memory, as torch counts who refers to it.
        references: how many do if nobody else has a tensor over the same memory.
        extra: tensors over the parameter's memory that the engine has besides ``alias``.
        pass_state: the last backward pass whose gradient was or is being combined.
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

    @property
    def is_aliased(self) -> bool:
        """Whether another tensor or process shares its memory, which the guard cannot hold."""
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
        """Takes note of where the gradient in the buffer is now."""
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


class FlatBuffers:
    """All trainable parameters of a model, with flat buffers for their gradients.

    Parameters stay in the memory in which the user made them, wherever that is at the time.

    Args:
        model: its trainable parameters' gradients lie in new buffers from now on.
        order: names of parameters, first used first; what is not named comes behind, as registered.
        without: names of parameters that are left alone.
        frozen: ids of parameters that belong here, though they require no gradient now.
        before: in which gradients have been until now.
        only: ids of the parameters that belong here, if no others do.

    Attributes:
        flats: the description of the buffers, one per dtype.
        grads: the buffers, one per entry of ``flats``.
        params: by order of first use.
        overlaps: some parameters share memory, so the order of their updates counts.
    """

    def __init__(
        self,
        model: nn.Module,
        order: Sequence[str] = (),
        *,
        without: Collection[str] = (),
        frozen: Collection[int] = (),
        before: FlatBuffers | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        self._model, self.without = model, without
        rank = {name: index for index, name in enumerate(order)}
        named = trainable(model, without, frozen)
        if only is not None:
            named = [one for one in named if id(one[2]) in only]
        named.sort(key=lambda item: rank.get(item[0], len(rank)))
        place = {name: index for index, (name, _, _) in enumerate(named)}
        self.flats = flats_for(named)
        device = named[0][2].device
        self.grads = [
            torch.zeros(flat.numel, dtype=getattr(torch, flat.dtype), device=device)
            for flat in self.flats
        ]
        by_name = {name: parameter for name, _, parameter in named}
        known = {id(param.parameter): param for param in before.params} if before else {}
        self.params = sorted(
            (
                self._place(by_name[slot.name], index, slot, place[slot.name], known)
                for index, flat in enumerate(self.flats)
                for slot in flat.slots
            ),
            key=lambda param: param.order,
        )
        self.note_memory()

    def in_order(self, order: Sequence[str]) -> FlatBuffers:
        """The same parameters, with new buffers in another order of first use."""
        here = {id(param.parameter) for param in self.params}
        without = self.without
        return FlatBuffers(self._model, order, without=without, frozen=here, before=self, only=here)

    def grown(self) -> FlatBuffers:
        """These parameters, named as in the model now, and those that are to be trained by now."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        here = [id(param.parameter) for param in self.params]
        order = [names[one] for one in here if one in names]
        return FlatBuffers(self._model, order, without=self.without, frozen=here, before=self)

    def _place(
        self,
        parameter: nn.Parameter,
        flat: int,
        slot: Slot,
        order: int,
        known: dict[int, FlatParam],
    ) -> FlatParam:
        before = known.get(id(parameter))
        like = before.raw_grad if before is not None else parameter
        # Detached, as users may detach gradients in place, which views refuse.
        grad = view_like(self.grads[flat], slot, like).detach()
        if before is not None and parameter.grad is before.grad and _alike(grad, before.grad):
            # The user's own object, and all views of it, move along.
            grad.copy_(before.grad)
            grad = _move(before.grad, grad)
        alias = before.alias if before is not None else nn.Parameter(parameter.detach())
        for name, value in vars(parameter).items():  # optimizers may look for marks on a parameter
            setattr(alias, name, value)
        raw_grad = grad.detach()
        param = FlatParam(
            slot.name, slot.layer, parameter, order, flat, slot, grad, raw_grad, alias
        )
        param.note_gradient()
        return param

    def note_memory(self) -> None:
        """Takes note of where parameters are now, and of who else has that memory."""
        for param in self.params:
            here = param.alias.untyped_storage()
            param.address, param.shape = param.alias.data_ptr(), param.alias.shape
            param.strides = param.alias.stride()
            param.storage = here._cdata
            param.is_exposed = param.alias.is_cpu and (here.is_shared() or not here.resizable())
        own = Counter[int]()
        for param in self.params:
            own[param.storage] += 2 + param.extra  # the parameter and its twin
        for param in self.params:
            param.references = own[param.storage] + _COUNTED_BESIDE
        self.overlaps = overlap([param.alias for param in self.params])

    def follow(self, moved: Sequence[FlatParam]) -> None:
        """From now on, updates go to the memory that these parameters have by now.

        That is what ``p.data = ...``, ``vector_to_parameters`` and ``share_memory`` change.

        Raises:
            SoonestError: one is of another dtype, shape or device now.
        """
        for param in moved:
            if not _alike(param.parameter, param.raw_grad):
                raise changed(param)
            param.alias.data = param.parameter.data
        self.note_memory()

    def take_back_gradient(self, param: FlatParam) -> None:
        """Moves a gradient in again whose memory the user has exchanged: ``p.grad.data = ...``."""
        here = view_like(self.grads[param.flat], param.slot, param.raw_grad).detach()
        with torch.no_grad():
            if param.grad.shape == here.shape:
                here.copy_(param.grad)
            param.grad.data = param.raw_grad = here
            param.note_gradient()

    def give_away(self, param: FlatParam) -> None:
        """Leaves the gradient in the buffer to the user, as it is, and the buffer to the next."""
        if param.grad.data_ptr() == param.grad_address:
            with torch.no_grad():
                copied = param.raw_grad.clone(memory_format=torch.preserve_format)
                _exchange(param.grad, copied)
        here = view_like(self.grads[param.flat], param.slot, param.raw_grad).detach()
        param.grad, param.raw_grad = here, here.detach()
        param.note_gradient()

    def move_out(self) -> None:
        """Gives every gradient in the buffers memory of its own again."""
        for param in self.params:
            moved = param.grad.data_ptr() != param.grad_address
            if param.parameter.grad is param.grad and not moved:
                param.parameter.grad = param.raw_grad.clone(memory_format=torch.preserve_format)


def changed(param: FlatParam) -> SoonestError:
    """What is wrong with a parameter of another dtype, shape or device than its place."""
    now, before = param.parameter, param.raw_grad
    return SoonestError(
        f"parameter {param.name!r} is {_described(now)} now, but was {_described(before)} when "
        "prioritize was called, and its gradients can only be combined as such: detach() the "
        "handle, change the model, and call prioritize again, on every rank"
    )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


def trainable(
    model: nn.Module, without: Collection[str] = (), frozen: Collection[int] = ()
) -> list[tuple[str, str, nn.Parameter]]:
    """``(name, layer, parameter)`` of every parameter that requires a gradient, as registered.

    A parameter that several modules share belongs to the first of them.

    Args:
        model: whose.
        without: names of parameters to leave out.
        frozen: ids of others to take in.
    """
    found: dict[int, tuple[str, str, nn.Parameter]] = {}
    for layer, module in model.named_modules():
        for name, parameter in module._parameters.items():
            full = f"{layer}.{name}" if layer else name
            if parameter is None or full in without:
                continue
            if parameter.requires_grad or id(parameter) in frozen:
                found.setdefault(id(parameter), (full, layer or "(root)", parameter))
    return list(found.values())


def flats_for(named: Sequence[tuple[str, str, nn.Parameter]]) -> tuple[Flat, ...]:
    """The flat buffers of what ``trainable`` gave, one per dtype.

    Complex numbers are in there as pairs of real ones.
    """
    return tuple(
        Flat.lay_out(
            str(dtype).removeprefix("torch."),
            dtype.itemsize,
            (
                (name, layer, p.numel() * (2 if p.is_complex() else 1))
                for name, layer, p in named
                if p.dtype.to_real() == dtype
            ),
        )
        for dtype in dict.fromkeys(parameter.dtype.to_real() for _, _, parameter in named)
    )


def view_like(buffer: Tensor, slot: Slot, tensor: Tensor) -> Tensor:
    """The slot's part of a buffer with a tensor's shape, and its strides if they leave no gaps."""
    part = _own_storage(buffer[slot.start : slot.start + slot.numel])
    if tensor.is_complex():
        part = torch.view_as_complex(part.unflatten(0, (slot.numel // 2, 2)))
    if is_non_overlapping_and_dense_or_false(tensor):
        return part.as_strided(tensor.size(), tensor.stride())
    return part.view(tensor.size())


def _own_storage(part: Tensor) -> Tensor:
    """The same memory with a storage of its own, which ends where the part does.

    So to save, pickle or share a parameter takes that parameter, and not its whole buffer; and it
    shows whether other tensors refer to the same memory.
    """
    if not part.numel():
        return part.clone()
    data = part.view(torch.uint8)
    own = torch.from_numpy(data.numpy()) if data.is_cpu else torch.from_dlpack(data)
    return own.view(part.dtype)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _move(tensor: Tensor, here: Tensor) -> Tensor:
    """Gives a tensor, and all others over its memory, the memory of one that equals it."""
    if tensor.untyped_storage().nbytes() == here.untyped_storage().nbytes():
        _exchange(tensor, here)
    else:
        tensor.data = here
    return tensor


def _exchange(one: Tensor, other: Tensor) -> None:
    """Lets what lies over the memory of one lie over that of the other, and the other way round."""
    storage: Any = one.untyped_storage()
    storage._swap_data_ptr_(other.untyped_storage())


class _Span(NamedTuple):
    storage: int
    start: int
    stop: int


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two of these may share memory."""
    spans = sorted(
        _Span(t.untyped_storage()._cdata, int(t.storage_offset()), _end(t))
        for t in tensors
        if t.numel()
    )
    return any(
        one.storage == other.storage and other.start < one.stop for one, other in pairwise(spans)
    )


def _end(tensor: Tensor) -> int:
    """Where in its storage it ends, behind the last element in memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + 1 + sum((n - 1) * step for n, step in steps)


def has_alias(gradient: Tensor) -> bool:
    """Whether another tensor lies over the memory of a gradient outside of the buffers."""
    return references(gradient.untyped_storage()._cdata) > 1 + _COUNTED_BESIDE


references: Any = torch._C._storage_Use_Count  # pyright: ignore[reportAttributeAccessIssue]
"""How many tensors lie over a storage, given as its ``_cdata``."""


def _counted_beside() -> int:
    alone = torch.empty(1)
    return references(alone.untyped_storage()._cdata) - 1


_COUNTED_BESIDE = _counted_beside()
"""Torch also counts what stands for the memory in Python."""
_OWN_VIEWS = 2 + _COUNTED_BESIDE
"""``FlatParam.grad`` and ``raw_grad``."""
_OWN_NAMES = 3
"""Of ``FlatParam.grad``: that one, its hold's, and that of whoever asks."""
