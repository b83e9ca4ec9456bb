"""Nobody reads a parameter or a gradient that is still in flight.

A tensor in flight is *held*: its ``__class__`` is switched to a subclass whose
``__torch_function__`` first lets it land, switches the class back, and only then goes on. So every
way of reading it through torch's Python interface waits for the right value. ``ModuleHooks`` cover
what does not pass there: ``autograd.Function.apply`` and C++ extensions that are handed raw
pointers.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from soonest.errors import ReadTooEarlyError

DisableGuard = torch._C.DisableTorchFunctionSubclass
"""Within this context, in this thread, held tensors are taken as they are."""


class PendingTensor:
    """A tensor that can be in flight, once or again and again.

    Args:
        tensor: any tensor without a ``__torch_function__`` of its own.
        wait_for_value: returns when the tensor has its value; called once per flight, before the
            first read.
        zero: takes note that the tensor is to become zero after it has landed; without it,
            zeroing waits like everything else.
        set_grad: takes note that ``tensor.grad`` is what the user has just made it, where that was
            unknown.

    Attributes:
        hides_grad: whether ``tensor.grad`` is unknown, too, until the tensor has landed.
    """

    __slots__ = (
        "__weakref__",
        "_free",
        "_held",
        "_me",
        "hides_grad",
        "set_grad",
        "tensor",
        "wait_for_value",
        "zero",
    )

    def __init__(
        self,
        tensor: Tensor,
        wait_for_value: Callable[[], None],
        zero: Callable[[], None] | None = None,
        *,
        set_grad: Callable[[], None] | None = None,
    ) -> None:
        self.tensor = tensor  # keeps the tensor, and so its id, alive
        self.wait_for_value = wait_for_value
        self.zero = zero
        self.set_grad = set_grad
        self.hides_grad = False
        self._free: Any = None
        self._held: Any = None
        self._me = _Entry(self, id(tensor))

    def mark_pending(self) -> None:
        """Marks the tensor as in flight."""
        _holds[self._me.key] = self._me
        cls = type(self.tensor)
        if cls is not self._held:
            if cls is not self._free:
                self._free = cls.held_from if issubclass(cls, _Held) else cls
                self._held = _held_class(self._free)
            self.tensor.__class__ = self._held

    def release(self) -> None:
        """Makes the tensor an ordinary one again, without waiting."""
        _holds.pop(self._me.key, None)
        if type(self.tensor) is self._held:
            self.tensor.__class__ = self._free


class _Entry(weakref.ref[PendingTensor]):
    """What is known of a hold as long as its owner lives: a model that is dropped is not kept."""

    __slots__ = ("key",)
    key: int

    def __new__(cls, hold: PendingTensor, key: int) -> _Entry:
        self = super().__new__(cls, hold, _forget)
        self.key = key
        return self


def _forget(entry: Any) -> None:
    if _holds.get(entry.key) is entry:
        del _holds[entry.key]


_holds: dict[int, _Entry] = {}


def _hold_of(tensor: Tensor) -> PendingTensor | None:
    entry = _holds.get(id(tensor))
    return None if entry is None else entry()


def wait_for(tensor: Tensor) -> None:
    """Waits until a held tensor has its value and releases it."""
    hold = _hold_of(tensor)
    if hold is not None:
        hold.wait_for_value()
        hold.release()
    if is_pending(tensor):  # a shallow copy of one: nothing holds it
        tensor.__class__ = type(tensor).held_from  # pyright: ignore


def any_pending() -> bool:
    """Whether anything may be in flight in this process."""
    return bool(_holds)


def wait_all(tensors: Iterable[Tensor] | None = None) -> None:
    """Lands these, or all that are held; but for gradients of a backward pass that still runs."""
    if tensors is None:
        holds = [entry() for entry in list(_holds.values())]
        tensors = [hold.tensor for hold in holds if hold is not None]
    for tensor in tensors:
        if is_pending(tensor):
            with suppress(ReadTooEarlyError):
                wait_for(tensor)


def is_pending(tensor: Tensor) -> bool:
    return issubclass(type(tensor), _Held)


def wait_module(module: nn.Module, args: Any = None) -> None:
    """Lands the parameters that a module owns itself; a forward pre-hook.

    Some of torch's own modules look at all that is below them when they evaluate, and take another
    way, with other rounding, if a parameter there is no plain tensor or a module has a hook.

    A plain tensor in the place of a parameter comes from ``functional_call``, and under a transform
    of ``torch.func`` it may wrap any parameter unseen, so everything lands then.
    """
    if not module.training and isinstance(module, _LOOK_BELOW):
        for parameter in module.parameters():
            if is_pending(parameter):
                wait_for(parameter)
        for hooks in list(_module_hooks):
            hooks.leave(module)
        return
    for parameter in module._parameters.values():
        if issubclass(type(parameter), _Held):
            wait_for(parameter)  # type: ignore[arg-type]
        elif type(parameter) is Tensor and _holds:
            for entry in list(_holds.values()):
                hold = entry()
                if hold is not None and isinstance(hold.tensor, nn.Parameter):
                    wait_for(hold.tensor)


_LOOK_BELOW = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class ModuleHooks:
    """``wait_module`` before the forward of every module that owns parameters.

    A module without hooks is called by a shorter way, so they are there only while they are needed.

    Args:
        modules: get the hooks, ahead of the user's own.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._hooks: dict[int, tuple[Any, RemovableHandle]] = {}
        self.move_to(modules)
        _module_hooks.add(self)

    def move_to(self, modules: Iterable[nn.Module]) -> None:
        """From now on these modules have the hooks."""
        self.remove()
        self._hooks = {
            id(module): (
                module._forward_pre_hooks,
                module.register_forward_pre_hook(wait_module, prepend=True),
            )
            for module in modules
            if isinstance(module, _LOOK_BELOW)
            or any(parameter is not None for parameter in module._parameters.values())
        }
        self._there = True

    def put(self) -> None:
        if not self._there:
            for hooks, handle in self._hooks.values():
                hooks[handle.id] = wait_module
                hooks.move_to_end(handle.id, last=False)
            self._there = True

    def leave(self, module: nn.Module) -> None:
        """No hook is needed any more on this module and all below it, for now."""
        for inner in module.modules():
            if (known := self._hooks.get(id(inner))) is not None:
                known[1].remove()
        self._there = False

    def remove(self) -> None:
        for _, handle in self._hooks.values():
            handle.remove()
        self._there = False


_module_hooks: weakref.WeakSet[ModuleHooks] = weakref.WeakSet()


class _Held:
    """Mixed into a tensor's class while the tensor is in flight."""

    __slots__ = ()
    held_from: type

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KEEPS_FLYING or (func == _GET_GRAD and not _hides_grad(args[0])):
            if func == _SET_GRAD:
                _know_grad(args[0])
            with DisableGuard():
                return func(*args, **kwargs)
        held = [tensor for tensor in tensors_in((args, kwargs)) if is_pending(tensor)]
        if func in _ZERO and _zero_later(held):
            return _zero_others(func, args[0])
        for tensor in held:
            wait_for(tensor)
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        wait_for(self)  # type: ignore[arg-type]
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        wait_for(self)  # type: ignore[arg-type]
        return self.__reduce_ex__(protocol)

    def as_subclass(self, cls: Any) -> Any:
        wait_for(self)  # type: ignore[arg-type]
        return self.as_subclass(cls)


@cache
def _held_class(cls: type) -> type:
    """The class of a ``cls`` in flight: it looks like ``cls`` to ``isinstance`` and to a reader."""
    namespace = {
        "held_from": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls)(cls.__name__, (_Held, cls), namespace)


def _hides_grad(tensor: Tensor) -> bool:
    hold = _hold_of(tensor)
    return hold is not None and hold.hides_grad


def _know_grad(tensor: Tensor) -> None:
    hold = _hold_of(tensor)
    if hold is not None and hold.hides_grad and hold.set_grad:
        hold.hides_grad = False
        hold.set_grad()


def _zero_later(held: list[Tensor]) -> bool:
    """Notes that these are to be zero once they have landed; False if one of them cannot be."""
    zeros = [hold.zero for tensor in held if (hold := _hold_of(tensor)) and hold.zero]
    if len(zeros) < len(held):
        return False
    for zero in zeros:
        zero()
    return True


def _zero_others(func: Any, target: Any) -> Any:
    if func is Tensor.zero_:
        return target
    free = [tensor for tensor in target if not is_pending(tensor)]
    return _foreach_zero(free) if free else None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


_foreach_zero: Any = torch._foreach_zero_  # pyright: ignore[reportPrivateImportUsage]
(_GET_GRAD,) = _getters("grad")
_SET_GRAD: Any = getattr(Tensor, "grad").__set__  # noqa: B009
_ZERO = {Tensor.zero_, _foreach_zero}
# What a tensor is, rather than what it holds: reading this need not wait.
_KEEPS_FLYING = {
    *_getters("shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn"),
    *_getters("is_sparse", "is_cuda", "is_meta", "is_quantized", "is_nested", "itemsize", "nbytes"),
    _SET_GRAD,
    Tensor.requires_grad_,
    Tensor.size,
    Tensor.numel,
    Tensor.nelement,
    Tensor.stride,
    Tensor.storage_offset,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.element_size,
    Tensor.__len__,
}
