"""Flat buffers: gradients lie in them, one behind the other, so that a bucket is one slice.

Parameters stay where the user made them; people exchange ``.data``, share memory and keep views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch._prims_common import is_non_overlapping_and_dense_or_false

from soonest.core.plan import Flat, Slot
from soonest.runtime.flat.param import FlatParam, changed
from soonest.runtime.flat.storage import FROM_PYTHON, exchange, move, overlap, with_own_storage


class FlatBuffers:
    """All trainable parameters of a model, with flat buffers for their gradients.

    Parameters stay in the memory in which the user made them, wherever that is at the time.

    Args:
        model: its trainable parameters' gradients lie in new buffers from now on.
        order: names of parameters, first used first; what is not named comes behind, as registered.
        without: names of parameters that are left alone.
        frozen: ids of parameters to take in, though they require no gradient now.
        before: the buffers in which gradients have been until now.
        only: ids of the parameters to take in; all if None.

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

    def __repr__(self) -> str:
        sizes = ", ".join(f"{flat.numel} {flat.dtype}" for flat in self.flats)
        first, last = self.params[0], self.params[-1]
        names = first.name if first is last else f"{first.name} … {last.name}"
        return f"FlatBuffers({sizes}; {len(self.params)} parameters: {names})"

    def in_order(self, order: Sequence[str]) -> FlatBuffers:
        """These buffers if their parameters have this order, or else new ones in which they do."""
        if list(order) == [param.name for param in self.params]:
            return self
        here = {id(param.parameter) for param in self.params}
        without = self.without
        return FlatBuffers(self._model, order, without=without, frozen=here, before=self, only=here)

    def grown(self) -> FlatBuffers:
        """New buffers for these parameters and for those that have come to be trained since."""
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
        """Makes the view of a slot that is the parameter's gradient, and the parameter's alias.

        Args:
            parameter: whose.
            flat: index of the buffer.
            slot: its place there.
            order: its rank in the order of first use.
            known: parameters of the buffers before these, by id of the user's own tensor.
        """
        before = known.get(id(parameter))
        like = before.raw_grad if before is not None else parameter
        # Detached, as users may detach gradients in place, which views refuse.
        grad = view_like(self.grads[flat], slot, like).detach()
        if before is not None and parameter.grad is before.grad and _alike(grad, before.grad):
            # The user's own object, and all views of it, move along.
            grad.copy_(before.grad)
            grad = move(before.grad, grad)
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
        """Remembers where parameters are now, and how many tensors lie over that memory."""
        for param in self.params:
            here = param.alias.untyped_storage()
            param.address, param.shape = param.alias.data_ptr(), param.alias.shape
            param.strides = param.alias.stride()
            param.storage = here._cdata
            param.is_exposed = param.alias.is_cpu and (here.is_shared() or not here.resizable())
        own = Counter[int]()
        for param in self.params:
            own[param.storage] += 2 + param.extra  # the parameter and its alias
        for param in self.params:
            param.references = own[param.storage] + FROM_PYTHON
        self.overlaps = overlap([param.alias for param in self.params])

    def follow(self, moved: Sequence[FlatParam]) -> None:
        """Lets updates go to the memory that these parameters have by now.

        The user changes it by ``p.data = ...``, ``vector_to_parameters`` and ``share_memory``.

        Raises:
            SoonestError: one is of another dtype, shape or device now.
        """
        for param in moved:
            if not _alike(param.parameter, param.raw_grad):
                raise changed(param)
            param.alias.data = param.parameter.data
        self.note_memory()

    def take_back_gradient(self, param: FlatParam) -> None:
        """Copies a gradient back whose memory the user has exchanged: ``p.grad.data = ...``."""
        here = view_like(self.grads[param.flat], param.slot, param.raw_grad).detach()
        with torch.no_grad():
            if param.grad.shape == here.shape:
                here.copy_(param.grad)
            param.grad.data = param.raw_grad = here
            param.note_gradient()

    def give_away(self, param: FlatParam) -> None:
        """Gives the user's gradient memory of its own, so that the next one can use the buffer."""
        if param.grad.data_ptr() == param.grad_address:
            with torch.no_grad():
                copied = param.raw_grad.clone(memory_format=torch.preserve_format)
                exchange(param.grad, copied)
        here = view_like(self.grads[param.flat], param.slot, param.raw_grad).detach()
        param.grad, param.raw_grad = here, here.detach()
        param.note_gradient()

    def move_out(self) -> None:
        """Gives every gradient in the buffers memory of its own, for training without soonest."""
        for param in self.params:
            moved = param.grad.data_ptr() != param.grad_address
            if param.parameter.grad is param.grad and not moved:
                param.parameter.grad = param.raw_grad.clone(memory_format=torch.preserve_format)


def trainable(
    model: nn.Module, without: Collection[str] = (), frozen: Collection[int] = ()
) -> list[tuple[str, str, nn.Parameter]]:
    """Lists ``(name, layer, parameter)`` of all parameters that require a gradient, as registered.

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
    """Lays out flat buffers, one per dtype; complex numbers lie there as pairs of real ones.

    Args:
        named: what ``trainable`` gave.
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
    """A slot of a buffer as a view with a tensor's shape, and its strides if they leave no gaps.

    Args:
        buffer: one-dimensional, of the tensor's dtype, real if that is complex.
        slot: the place in it.
        tensor: whose shape and strides.
    """
    part = with_own_storage(buffer[slot.start : slot.start + slot.numel])
    if tensor.is_complex():
        part = torch.view_as_complex(part.unflatten(0, (slot.numel // 2, 2)))
    if is_non_overlapping_and_dense_or_false(tensor):
        return part.as_strided(tensor.size(), tensor.stride())
    return part.view(tensor.size())


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
