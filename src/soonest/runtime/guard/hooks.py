"""Hooks that do not go where they should not: into copies, or round in circles."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class Calling:
    """A forward hook that calls back with what it is given behind the module.

    Copies of the model call nobody.
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
    pass


def weak_hook(method: Callable[..., None], *given: Any) -> Callable[..., None]:
    """A hook that calls a method with these arguments and its own, as long as the object lives.

    Python cannot see what torch's hooks of a tensor refer to, so a cycle through them is never
    collected.
    """
    assert isinstance(method, MethodType)
    owner, function = weakref.ref(method.__self__), method.__func__

    def hook(*args: Any) -> None:
        alive = owner()
        if alive is not None:
            function(alive, *given, *args)

    return hook
