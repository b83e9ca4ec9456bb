"""The user's optimizer object, with its ``step`` going through the engine.

The object stays the same one. Only its class becomes a subclass of the user's, so ``isinstance``
holds, and so do schedulers, which patch ``step`` on the instance and need a bound method, made
before or after.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from soonest.runtime.state import OptimizerState


class Driver(Protocol):
    """What the optimizer needs of the engine."""

    def step(self, closure: Callable[[], Any] | None) -> Any: ...

    def clear_gradients(self) -> None: ...

    def flush(self) -> None: ...

    def groups_changed(self) -> None: ...


def take_over(optimizer: Optimizer, driver: Driver, state: OptimizerState) -> None:
    """Lets ``optimizer`` call ``driver``; ``check_step`` has said that it can."""
    cls = type(optimizer)
    loading: list[bool] = []

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
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
        return self.__dict__["state"]

    def set_state(self: Optimizer, value: Any) -> None:
        driver.flush()
        self.__dict__["state"] = value

    def load_state_dict(self: Any, state_dict: Any) -> None:
        driver.flush()
        loading.append(True)
        try:
            cls.load_state_dict(self, state_dict)
        finally:
            loading.pop()
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
    }
    _reroute(optimizer, cls.step, hooked)
    optimizer.__class__ = type(cls.__name__, (cls,), namespace)


def hand_back(optimizer: Optimizer) -> None:
    """Undoes ``take_over``."""
    cls: Any = type(optimizer)
    _reroute(optimizer, cls.step, cls.taken_from.step)
    optimizer.__class__ = cls.taken_from


def is_taken_over(optimizer: Optimizer) -> bool:
    return hasattr(type(optimizer), "taken_from")


def check_step(optimizer: Optimizer) -> None:
    """Raises ValueError if what has replaced ``optimizer.step`` cannot be seen through."""
    wrapper, step = optimizer.__dict__.get("step"), type(optimizer).step
    if wrapper is not None and not _replace_in_closure(wrapper, step, step):
        raise ValueError(
            f"optimizer.step of this {type(optimizer).__name__} was replaced by {wrapper!r}, "
            "which does not lead to the optimizer's own step: "
            "call soonest.prioritize before replacing it"
        )


def _reroute(optimizer: Optimizer, old: Any, new: Any) -> None:
    """A scheduler made earlier has wrapped ``step`` on the instance: let it wrap the new one."""
    wrapper = optimizer.__dict__.get("step")
    if wrapper is not None:
        _replace_in_closure(wrapper, old, new)


def _replace_in_closure(function: Any, old: Any, new: Any) -> bool:
    function = getattr(function, "__func__", function)
    found = False
    for cell in getattr(function, "__closure__", None) or ():
        content = cell.cell_contents
        if content is old:
            cell.cell_contents = new
            found = True
        elif isinstance(content, types.FunctionType | types.MethodType):
            found |= _replace_in_closure(content, old, new)
    return found


def _bare(cls: type[Optimizer]) -> Optimizer:
    """What a copy of a taken-over optimizer starts from: one of the user's own class."""
    return object.__new__(cls)


def clear(optimizer: Optimizer) -> None:
    """Sets every gradient of the optimizer's parameters to None, without touching their values."""
    with torch._C.DisableTorchFunctionSubclass():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
