"""Flat buffers: parameters and gradients are views of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._prims_common import is_non_overlapping_and_dense_or_false

from soonest.core.plan import Flat, Slot
from soonest.errors import SoonestError

if TYPE_CHECKING:
    from soonest.runtime.sweep import Sweep


@dataclass(eq=False, slots=True)
class Member:
    """One trainable parameter in its place in the flat buffers.

    Args:
        name: as in ``model.named_parameters()``.
        layer: name of the module that owns it.
        parameter: the user's own object.
        order: its rank in the order of first use.
        flat: index of its flat buffer.
        slot: its place there.
        grad: view of the gradient buffer that becomes ``parameter.grad``; it may be held.
        raw_grad: the same memory as a tensor that only the engine sees; it is never held.
        twin: the same memory as ``parameter``, sharing its version counter; what the optimizer
            updates, so that an update never meets the guard.
        address, grad_address: of that memory, and of the gradient's.
        storage: what stands for it, as torch counts who refers to it.
        references: how many do if nobody else has a tensor over the same memory.
        sweep: the last backward pass whose gradient was or is being combined.
    """

    name: str
    layer: str
    parameter: nn.Parameter
    order: int
    flat: int
    slot: Slot
    grad: Tensor
    raw_grad: Tensor
    twin: nn.Parameter
    address: int = 0
    grad_address: int = 0
    storage: int = 0
    references: int = 0
    sweep: Sweep | None = field(default=None)

    def note_memory(self) -> None:
        """Takes note of where the parameter is now."""
        self.address = self.twin.data_ptr()
        self.storage = self.twin.untyped_storage()._cdata
        self.references = _references(self.storage)

    @property
    def is_aliased(self) -> bool:
        """Whether another tensor shares the parameter's memory, which the guard cannot hold."""
        return _references(self.storage) > self.references


class Layout:
    """All trainable parameters of a model, moved into flat buffers.

    Args:
        model: its trainable parameters become views of new buffers, with their values kept.
        order: names of parameters, first used first; what is not named comes behind, as registered.
        without: names of parameters that stay as they are.
        frozen: ids of parameters that belong here, though they require no gradient now.

    Attributes:
        flats: the description of the buffers, one per dtype.
        parameters, grads: the buffers, one pair per entry of ``flats``.
        members: by order of first use.
    """

    def __init__(
        self,
        model: nn.Module,
        order: Sequence[str] = (),
        *,
        without: Collection[str] = (),
        frozen: Collection[int] = (),
    ) -> None:
        self._model, self.without = model, without
        rank = {name: index for index, name in enumerate(order)}
        named = trainable(model, without, frozen)
        named.sort(key=lambda item: rank.get(item[0], len(rank)))
        place = {name: index for index, (name, _, _) in enumerate(named)}
        self.flats = flats_for(named)
        dtypes = [getattr(torch, flat.dtype) for flat in self.flats]
        device = named[0][2].device
        self.parameters = [
            torch.zeros(flat.numel, dtype=dtype, device=device)
            for flat, dtype in zip(self.flats, dtypes, strict=True)
        ]
        self.grads = [torch.zeros_like(buffer) for buffer in self.parameters]
        by_name = {name: parameter for name, _, parameter in named}
        self.members = sorted(
            (
                self._move_in(by_name[slot.name], index, slot, place[slot.name])
                for index, flat in enumerate(self.flats)
                for slot in flat.slots
            ),
            key=lambda member: member.order,
        )
        for member in self.members:
            member.note_memory()
            member.grad_address = member.raw_grad.data_ptr()

    def in_order(self, order: Sequence[str]) -> Layout:
        """The same parameters in new buffers, in another order of first use.

        With them come those that are to be trained by now.
        """
        here = {id(member.parameter) for member in self.members}
        return Layout(self._model, order, without=self.without, frozen=here)

    def grown(self) -> Layout:
        """These parameters, named as in the model now, and those that are to be trained by now."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        here = [id(member.parameter) for member in self.members]
        return self.in_order([names[one] for one in here if one in names])

    def _move_in(self, parameter: nn.Parameter, flat: int, slot: Slot, order: int) -> Member:
        with torch.no_grad():
            here = view_like(self.parameters[flat], slot, parameter)
            here.copy_(parameter)
            parameter.data = here
            # Detached, as users may detach gradients in place, which views refuse.
            grad = view_like(self.grads[flat], slot, parameter).detach()
            if parameter.grad is not None:
                grad.copy_(parameter.grad)
                parameter.grad = grad
        twin = nn.Parameter(parameter.detach())
        for name, value in vars(parameter).items():  # optimizers may look for marks on a parameter
            setattr(twin, name, value)
        return Member(
            slot.name, slot.layer, parameter, order, flat, slot, grad, grad.detach(), twin
        )

    def take_back(self, member: Member) -> None:
        """Moves a parameter in again that the user has given other memory, with its values there.

        That is what ``p.data = ...``, ``vector_to_parameters`` and ``share_memory`` do.

        Raises:
            SoonestError: it is of another dtype, shape or device now.
        """
        now, before = member.parameter, member.raw_grad
        if now.shape != before.shape or now.dtype != before.dtype or now.device != before.device:
            raise changed(member)
        with torch.no_grad():
            here = view_like(self.parameters[member.flat], member.slot, before)
            here.copy_(now)
            now.data = here
            member.twin.data = here
        del here
        member.note_memory()

    def take_back_gradient(self, member: Member) -> None:
        """The same of its gradient: ``p.grad.data = ...`` gives that other memory."""
        here = view_like(self.grads[member.flat], member.slot, member.raw_grad).detach()
        with torch.no_grad():
            if member.grad.shape == here.shape:
                here.copy_(member.grad)
            member.grad.data = member.raw_grad = here

    def move_out(self) -> None:
        """Gives every parameter, and every gradient in the buffers, memory of its own again."""
        for member in self.members:
            parameter = member.parameter
            parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
            if parameter.grad is member.grad:
                parameter.grad = member.raw_grad.clone(memory_format=torch.preserve_format)


def changed(member: Member) -> SoonestError:
    """What is wrong with a parameter of another dtype, shape or device than in the buffers."""
    now, before = member.parameter, member.raw_grad
    return SoonestError(
        f"parameter {member.name!r} is {_described(now)} now, but was {_described(before)} when "
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


_references = torch._C._storage_Use_Count  # pyright: ignore[reportAttributeAccessIssue]
