"""Where gradients are added up: before and after that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge


class AccumulationHooks:
    """Hooks of the node that adds gradients to one parameter's ``grad``.

    So they come behind all hooks that users put on the parameter itself, whenever they do.

    Args:
        parameter: whose; it may be frozen, now or later.
        after: called when ``parameter.grad`` has changed.
        before: called when it is about to.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        *,
        after: Callable[..., None],
        before: Callable[..., None] | None = None,
    ) -> None:
        # The parameter itself does not keep the node, and with it the hooks, alive.
        self._parameter = parameter
        self._node = _accumulator(parameter)
        self._handles = [self._node.register_hook(after)]
        if before is not None:
            self._handles.append(self._node.register_prehook(before))

    @property
    def is_outdated(self) -> bool:
        """Whether another node adds them now: torch makes one when the dtype has changed."""
        return _accumulator(self._parameter) is not self._node

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _accumulator(parameter: nn.Parameter) -> Any:
    frozen = not parameter.requires_grad
    with torch._C.DisableTorchFunctionSubclass():  # what is in flight may stay there
        parameter.requires_grad_()
        try:
            return get_gradient_edge(parameter).node
        finally:
            if frozen:
                parameter.requires_grad_(False)
