"""Hook helpers that survive deepcopy and make no reference cycles."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class Calling:
    """A forward hook that passes its arguments on, without the module; in copies it does nothing.

    Args:
        call: gets the arguments.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if "_is_replica" in vars(module):
            raise ValueError(
                "the model has been wrapped by DataParallel, whose replicas soonest cannot train: "
                "leave that out and start one process for each device, as torchrun does"
            )
        self._call(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Calling, (noop,))


def noop(*_: Any) -> None:
    """Does nothing, with any arguments."""


def weak_hook(method: Callable[..., None], *given: Any) -> Callable[..., None]:
    """Makes a hook that calls a method, but does not keep the method's object alive.

    Python cannot see what torch's hooks of a tensor refer to, so a cycle through them is never
    collected.

    Args:
        method: bound; the hook does nothing once its object is gone.
        given: its first arguments; those of the hook follow.
    """
    assert isinstance(method, MethodType)
    owner, function = weakref.ref(method.__self__), method.__func__

    def hook(*args: Any) -> None:
        alive = owner()
        if alive is not None:
            function(alive, *given, *args)

    return hook
