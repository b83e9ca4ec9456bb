"""Hooks of torch's that call the engine back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from soonest.runtime.engine import Engine
    from soonest.runtime.layout import Member


def on_gradient(
    engine: Engine, call: Callable[[Engine, Member, Any], None], order: int
) -> Callable[[Tensor], None]:
    """A hook of a parameter.

    It does not keep the engine alive: Python cannot see what torch's hooks of a tensor refer to, so
    a cycle through them would never be collected.

    Args:
        engine: to be called back.
        call: its method, unbound.
        order: of the member, with which and with the tensor it is called.
    """
    alive = weakref.ref(engine)

    def hook(tensor: Tensor) -> None:
        engine = alive()
        if engine is not None:
            call(engine, engine.layout.members[order], tensor)

    return hook


class OnForward:
    """A forward hook. Copies of the model call nobody."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, model: nn.Module, *given: Any) -> None:
        self._call(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return (OnForward, (nobody,))


def nobody(*_: Any) -> None:
    pass
