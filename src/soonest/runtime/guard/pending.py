"""Nobody reads a parameter or a gradient that is still in flight.

A tensor in flight is *pending*: its ``__class__`` is switched to a subclass whose
``__torch_function__`` first waits for the value, switches the class back, and only then goes on. So
every way of reading it through torch's Python interface waits for the right value.

The class is what to switch, since the tensor has to stay the object that the user, the modules and
the optimizer refer to. A wrapper would be another object, and a flag would have to be looked at by
somebody; a class costs 0.2 µs to switch, and nothing as long as nothing is pending. What does not
pass through ``__torch_function__``, ``autograd.Function.apply`` and C++ extensions that are handed
raw pointers, is covered by ``module_hooks``.
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

from soonest.errors import ReadTooEarlyError

DisableGuard = torch._C.DisableTorchFunctionSubclass
"""Within this context, in this thread, pending tensors are used as they are, without waiting."""


class PendingTensor:
    """A tensor that can be in flight, once or again and again.

    Args:
        tensor: any tensor without a ``__torch_function__`` of its own.
        wait_for_value: returns when the tensor has its value; called once per flight, before the
            first read.
        zero: makes the tensor zero once it is ready; without it, zeroing waits like all else.
        set_grad: called when the user sets ``tensor.grad`` while that is unknown.

    Attributes:
        hides_grad: whether ``tensor.grad`` is unknown, too, until the tensor is ready.
    """

    __slots__ = (
        "__weakref__",
        "_entry",
        "_guarded",
        "_plain",
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
        self._plain: Any = None
        self._guarded: Any = None
        self._entry = _Entry(self, id(tensor))

    def __repr__(self) -> str:
        with DisableGuard():
            kind, shape = type(self.tensor).__name__, tuple(self.tensor.shape)
            state = "pending" if is_pending(self.tensor) else "ready"
        return f"PendingTensor({kind} {shape}, {state})"

    def mark_pending(self) -> None:
        """Marks the tensor as in flight."""
        _entries[self._entry.key] = self._entry
        cls = type(self.tensor)
        if cls is not self._guarded:
            if cls is not self._plain:
                self._plain = cls.plain_class if issubclass(cls, Pending) else cls
                self._guarded = _guarded_class(self._plain)
            self.tensor.__class__ = self._guarded

    def release(self) -> None:
        """Makes the tensor an ordinary one again, without waiting."""
        _entries.pop(self._entry.key, None)
        if type(self.tensor) is self._guarded:
            self.tensor.__class__ = self._plain


class _Entry(weakref.ref[PendingTensor]):
    """Leads from a tensor's id to its ``PendingTensor``, without keeping a dropped model alive."""

    __slots__ = ("key",)
    key: int

    def __new__(cls, owner: PendingTensor, key: int) -> _Entry:
        self = super().__new__(cls, owner, _forget)
        self.key = key
        return self


def _forget(entry: Any) -> None:
    if _entries.get(entry.key) is entry:
        del _entries[entry.key]


_entries: dict[int, _Entry] = {}


def _pending_of(tensor: Tensor) -> PendingTensor | None:
    entry = _entries.get(id(tensor))
    return None if entry is None else entry()


def wait_for(tensor: Tensor) -> None:
    """Waits until a pending tensor has its value, and makes it an ordinary one again."""
    known = _pending_of(tensor)
    if known is not None:
        known.wait_for_value()
        known.release()
    if is_pending(tensor):  # a shallow copy of one, which nobody knows
        tensor.__class__ = type(tensor).plain_class  # pyright: ignore


def any_pending() -> bool:
    """Whether anything may be in flight in this process."""
    return bool(_entries)


def wait_all(tensors: Iterable[Tensor] | None = None) -> None:
    """Waits for these, or all that are pending, but not for gradients of a pass that still runs."""
    if tensors is None:
        tensors = [one.tensor for one in _all_pending()]
    for tensor in tensors:
        if is_pending(tensor):
            with suppress(ReadTooEarlyError):
                wait_for(tensor)


def wait_for_parameters() -> None:
    """Waits for all parameters that are pending in this process."""
    for one in _all_pending():
        if isinstance(one.tensor, nn.Parameter):
            wait_for(one.tensor)


def _all_pending() -> list[PendingTensor]:
    return [one for entry in list(_entries.values()) if (one := entry()) is not None]


def is_pending(tensor: Tensor) -> bool:
    """Whether a tensor is in flight; looking at it does not wait."""
    return issubclass(type(tensor), Pending)


class Pending:
    """Mixed into a tensor's class while the tensor is in flight.

    Attributes:
        plain_class: the tensor's class before and after.
    """

    __slots__ = ()
    plain_class: type

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NEEDS_NO_VALUE or (func == _GET_GRAD and not _hides_grad(args[0])):
            if func == _SET_GRAD:
                _grad_is_set(args[0])
            with DisableGuard():
                return func(*args, **kwargs)
        pending = [tensor for tensor in tensors_in((args, kwargs)) if is_pending(tensor)]
        if func in _ZERO and _zero_later(pending):
            return _zero_others(func, args[0])
        for tensor in pending:
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
def _guarded_class(cls: type) -> type:
    """The class of a ``cls`` in flight: it looks like ``cls`` to ``isinstance`` and to a reader."""
    namespace = {
        "plain_class": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls)(cls.__name__, (Pending, cls), namespace)


def _hides_grad(tensor: Tensor) -> bool:
    known = _pending_of(tensor)
    return known is not None and known.hides_grad


def _grad_is_set(tensor: Tensor) -> None:
    known = _pending_of(tensor)
    if known is not None and known.hides_grad and known.set_grad:
        known.hides_grad = False
        known.set_grad()


def _zero_later(tensors: list[Tensor]) -> bool:
    """Lets these become zero once they are ready; False if one of them cannot be."""
    zeros = [known.zero for tensor in tensors if (known := _pending_of(tensor)) and known.zero]
    if len(zeros) < len(tensors):
        return False
    for zero in zeros:
        zero()
    return True


def _zero_others(func: Any, target: Any) -> Any:
    if func is Tensor.zero_:
        return target
    ready = [tensor for tensor in target if not is_pending(tensor)]
    return _foreach_zero(ready) if ready else None


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
_NEEDS_NO_VALUE = {
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
"""What a tensor is, rather than the values in it: reading this need not wait."""
