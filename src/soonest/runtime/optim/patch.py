"""The user's optimizer object, with its ``step`` going through the engine.

The object stays the same one. Only its class becomes a subclass of the user's, so ``isinstance``
holds, and so do schedulers, which patch ``step`` on the instance and need a bound method, made
before or after.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from soonest.runtime.optim.bucket_update import raw_step
from soonest.runtime.optim.state import OptimizerState


class Driver(Protocol):
    """What the optimizer needs of the engine."""

    def step(self, closure: Callable[[], Any] | None) -> Any: ...

    def clear_gradients(self) -> None: ...

    def flush(self) -> None: ...

    def groups_changed(self) -> None: ...


def take_over(optimizer: Optimizer, driver: Driver, state: OptimizerState) -> None:
    """Lets an optimizer call a driver, by a subclass of its class.

    Args:
        optimizer: the user's own.
        driver: called in the place of its methods.
        state: of the optimizer; told when the user gets or replaces it.
    """
    cls = type(optimizer)
    mine = weakref.ref(optimizer)
    loading: list[bool] = []

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        if self is not mine():
            raise ValueError(
                f"this {type(self).__name__} was made from the class of a prioritized optimizer, "
                "as some libraries do to reduce gradients themselves: leave that out"
            )
        if vars(type(self)).get("taken_by") is not driver:  # kept from before it was handed back
            return raw_step(type(self))(self, closure)
        return driver.step(closure)

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        if set_to_none:
            driver.clear_gradients()
        else:
            cls.zero_grad(self, set_to_none=False)

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        cls.add_param_group(self, param_group)
        try:
            driver.groups_changed()
        except ValueError:
            self.param_groups.pop()
            raise

    def get_state(self: Optimizer) -> Any:
        driver.flush()  # updates in flight write to the state
        if not loading:
            state.check()
        state.note_given()
        return self.__dict__["state"]

    def set_state(self: Optimizer, value: Any) -> None:
        driver.flush()
        state.note_given()
        self.__dict__["state"] = value

    def load_state_dict(self: Any, state_dict: Any) -> None:
        driver.flush()
        loading.append(True)
        try:
            cls.load_state_dict(self, state_dict)
        finally:
            loading.pop()
        state.note_loaded()
        state.adopt()

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return (_bare, (cls,), self.__getstate__())

    # The base class's wrapper runs the user's step hooks, once per step rather than once per
    # bucket.
    hooked: Any = Optimizer.profile_hook_step(step)
    hooked.hooked = True
    namespace = {
        "step": hooked,
        "zero_grad": zero_grad,
        "add_param_group": add_param_group,
        "state": property(get_state, set_state),
        "load_state_dict": load_state_dict,
        "__reduce_ex__": reduce_ex,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "taken_from": cls,
        "taken_by": driver,
    }
    _reroute(optimizer, cls.step, hooked)
    optimizer.__class__ = type(cls.__name__, (cls,), namespace)


def hand_back(optimizer: Optimizer) -> None:
    """Undoes ``take_over``."""
    cls: Any = type(optimizer)
    _reroute(optimizer, cls.step, cls.taken_from.step)
    optimizer.__class__ = cls.taken_from


def is_taken_over(optimizer: Optimizer) -> bool:
    """Whether an optimizer calls a driver now."""
    return hasattr(type(optimizer), "taken_from")


def optimizer_in(given: Any) -> Any:
    """The optimizer that does the work: the only one in a wrapper that is none itself.

    Wrappers of frameworks often derive from torch's class without ever making themselves one.

    Args:
        given: an optimizer, or a wrapper of one.

    Raises:
        TypeError: it is such a wrapper, and it does not show which optimizer it wraps.
    """
    if isinstance(given, Optimizer) and hasattr(given, "_optimizer_step_pre_hooks"):
        return given
    inner = {
        id(one): one
        for one in getattr(given, "__dict__", {}).values()
        if isinstance(one, Optimizer)
    }
    if len(inner) == 1:
        return optimizer_in(*inner.values())
    kind = type(given).__name__
    if not isinstance(given, Optimizer):
        raise TypeError(f"an optimizer is a {kind}, but must be a torch.optim.Optimizer")
    raise TypeError(
        f"an optimizer is a {kind} that never called Optimizer.__init__, and it holds "
        f"{len(inner) or 'no'} optimizers: give prioritize the torch.optim.Optimizer that it "
        "wraps, as in soonest.prioritize(model, wrapper.optimizer)"
    )


def hides_step(optimizer: Optimizer) -> bool:
    """Whether what has replaced ``optimizer.step`` is seen not to lead to the optimizer's own."""
    wrapper, step = optimizer.__dict__.get("step"), type(optimizer).step
    return wrapper is not None and _replaced(wrapper, step, step) is None


def _reroute(optimizer: Optimizer, old: Any, new: Any) -> None:
    """Lets a scheduler that has wrapped ``step`` on the instance wrap the new one."""
    wrapper = optimizer.__dict__.get("step")
    if wrapper is not None and (replaced := _replaced(wrapper, old, new)) is not None:
        optimizer.__dict__["step"] = replaced


def _replaced(value: Any, old: Any, new: Any, seen: frozenset[int] = frozenset()) -> Any:
    """Replaces one function by another wherever a callable leads to it.

    Returns:
        The callable, changed in place where that is possible; None if it does not lead there.
    """
    if value is old:
        return new
    if id(value) in seen:
        return None
    seen |= {id(value)}
    if isinstance(value, types.MethodType):
        function = _replaced(value.__func__, old, new, seen)
        return None if function is None else types.MethodType(function, value.__self__)
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        func = _replaced(value.func, old, new, seen)
        args = [_replaced(one, old, new, seen) for one in value.args]
        named = {key: _replaced(one, old, new, seen) for key, one in value.keywords.items()}
        if func is None and not any(one is not None for one in (*args, *named.values())):
            return None
        parts = (
            value.func if func is None else func,
            tuple(a if b is None else b for a, b in zip(value.args, args, strict=True)),
            {key: value.keywords[key] if one is None else one for key, one in named.items()},
        )
        value.__setstate__((*parts, vars(value) or None))  # pyright: ignore
        return value
    if not isinstance(value, types.FunctionType):
        return None
    found = False
    for cell in value.__closure__ or ():
        if (inner := _replaced(_content(cell), old, new, seen)) is not None:
            cell.cell_contents = inner
            found = True
    defaults = [_replaced(one, old, new, seen) for one in value.__defaults__ or ()]
    if any(one is not None for one in defaults):
        before = value.__defaults__ or ()
        value.__defaults__ = tuple(
            a if b is None else b for a, b in zip(before, defaults, strict=True)
        )
        found = True
    return value if found else None


def _content(cell: types.CellType) -> Any:
    """The value in a closure's cell; None if it has none yet."""
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _bare(cls: type[Optimizer]) -> Optimizer:
    """Makes what a copy of a taken-over optimizer starts from: one of the user's own class."""
    return object.__new__(cls)


def clear(optimizer: Optimizer) -> None:
    """Sets every gradient of the optimizer's parameters to None, without touching their values."""
    with torch._C.DisableTorchFunctionSubclass():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
