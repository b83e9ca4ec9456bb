"""What is left to do in a group of one rank: to refuse what several ranks would refuse."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from soonest.runtime.flat.buffers import trainable
from soonest.runtime.guard.hooks import Calling
from soonest.runtime.validate import wrappers


class Alone:
    """A model that is prioritized on its only rank; it lives as long as the model does.

    Args:
        model: the user's own.
        without: names of parameters that are left alone.
    """

    def __init__(self, model: nn.Module, without: Collection[str]) -> None:
        self._model = weakref.ref(model)
        self._without = without
        self._hook = model.register_forward_pre_hook(Calling(self._forward_begins))
        _all.add(self)

    def _forward_begins(self, *_: Any) -> None:
        wrappers.check_caller()

    def holds(self, parameters: Collection[int]) -> bool:
        """Whether any of these, given by their ids, are among its parameters."""
        model = self._model()
        return model is not None and any(
            id(parameter) in parameters for _, _, parameter in trainable(model, self._without)
        )

    def detach(self) -> None:
        """Leaves the model as it would be without soonest."""
        self._hook.remove()
        _all.discard(self)


def holds_any(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of these are prioritized in a group of one rank."""
    mine = {id(parameter) for parameter in parameters}
    return any(one.holds(mine) for one in list(_all))


_all: weakref.WeakSet[Alone] = weakref.WeakSet()
