"""Hooks by which a backward pass is seen: on what is trained, and on what comes to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod

from torch import nn

from soonest.runtime.flat.param import FlatParam
from soonest.runtime.guard.accumulation import AccumulationHooks
from soonest.runtime.guard.hooks import weak_hook


class GradientHooks:
    """Hooks of all parameters that are trained.

    They refer weakly to what they call, as autograd's nodes keep them alive.

    Args:
        before: a method, called with a parameter's order when its gradient is about to be written.
        after: the same, called when it has been written.
        newcomer: a method, called when a parameter gets a gradient that was frozen so far.
    """

    def __init__(
        self,
        before: Callable[..., None],
        after: Callable[..., None],
        newcomer: Callable[..., None],
    ) -> None:
        self._before, self._after = WeakMethod(before), WeakMethod(after)
        self._newcomer = WeakMethod(newcomer)
        self._hooks: list[AccumulationHooks] = []
        self._frozen: list[nn.Parameter] = []

    def bind(self, params: Sequence[FlatParam], newcomers: Sequence[nn.Parameter]) -> None:
        """From now on, looks at these.

        Args:
            params: that are trained.
            newcomers: others that may come to be.
        """
        self.remove()
        self._hooks = [self._of(param) for param in params]
        self._frozen = list(newcomers)
        self.look_out()

    def look_out(self) -> None:
        """Puts hooks on what is trained by now: on a frozen one they would count as a use of it."""
        trained = [parameter for parameter in self._frozen if parameter.requires_grad]
        if not trained:
            return
        self._frozen = [parameter for parameter in self._frozen if not parameter.requires_grad]
        newcomer: Any = self._newcomer()
        for parameter in trained:
            self._hooks.append(AccumulationHooks(parameter, after=weak_hook(newcomer)))

    def renew(self, param: FlatParam) -> None:
        """The parameter may be another to autograd than it was."""
        if self._hooks[param.order].is_outdated:
            self._hooks[param.order].remove()
            self._hooks[param.order] = self._of(param)

    def remove(self) -> None:
        """Takes all of them off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _of(self, param: FlatParam) -> AccumulationHooks:
        # By its order: the parameter itself may lead to what the hooks belong to.
        before: Any = self._before()
        after: Any = self._after()
        return AccumulationHooks(
            param.parameter,
            before=weak_hook(before, param.order),
            after=weak_hook(after, param.order),
        )
