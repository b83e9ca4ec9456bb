"""Hooks just before and after autograd adds to a parameter's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge


class AccumulationHooks:
    """Hooks of the node that adds gradients to one parameter's ``grad``.

    Hooks of the node run behind all that users put on the parameter itself, whenever they do.

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
        """Whether torch has made another node, as when the parameter's dtype has changed."""
        return _accumulator(self._parameter) is not self._node

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class InnerPasses:
    """Backward passes inside of another one, as reentrant checkpoints run them.

    A parameter that several of them use gets a gradient from each, and only the end of the whole
    pass shows which is the last. So gradients from inside wait for that end, unless the parameter
    got just one in an earlier pass.
    """

    def __init__(self) -> None:
        self._whole = _NONE
        self._once: set[int] = set()
        self._waiting: dict[int, int] = {}

    def begin(self) -> None:
        """Notes that the pass that runs now is the whole one."""
        self._whole = _current_pass()

    def here(self) -> bool:
        """Whether the pass that runs now is inside the whole one."""
        return _current_pass() != self._whole

    def must_wait(self, parameter: nn.Parameter) -> bool:
        """Whether the gradient that has been written now may not be the last of the whole pass."""
        key = id(parameter)
        if key in self._once or not (self.here() or key in self._waiting):
            return False
        self._waiting[key] = self._waiting.get(key, 0) + 1
        return True

    def end(self) -> set[int]:
        """Ends the whole pass; returns the ids of the parameters that have waited for that."""
        waited, self._waiting, self._whole = self._waiting, {}, _NONE
        self._once |= {key for key, times in waited.items() if times == 1}
        return set(waited)


_NONE = -1
"""The number that torch gives where no backward pass runs."""
_current_pass = torch._C._current_graph_task_id  # pyright: ignore[reportAttributeAccessIssue]


def _accumulator(parameter: nn.Parameter) -> Any:
    """The node of the graph that adds to this parameter's gradient."""
    frozen = not parameter.requires_grad
    # What is in flight may stay there, and a graph is needed, whatever the user does just now.
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False), torch.enable_grad():
        parameter.requires_grad_()
        try:
            return get_gradient_edge(parameter).node
        finally:
            if frozen:
                parameter.requires_grad_(False)
