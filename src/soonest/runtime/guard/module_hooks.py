"""Forward pre-hooks that wait for parameters which a module reads past the guard of its tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from soonest.runtime.guard.pending import (
    Pending,
    any_pending,
    is_pending,
    wait_for,
    wait_for_parameters,
)


def wait_module(module: nn.Module, args: Any = None) -> None:
    """Waits for the parameters that a module owns itself; a forward pre-hook.

    Some of torch's own modules look at all that is below them when they evaluate, and take another
    way, with other rounding, if a parameter there is no plain tensor or a module has a hook.

    A plain tensor in the place of a parameter comes from ``functional_call``, and under a transform
    of ``torch.func`` it may wrap any parameter unseen, so all parameters are waited for then.
    """
    if not module.training and isinstance(module, _LOOK_BELOW):
        for parameter in module.parameters():
            if is_pending(parameter):
                wait_for(parameter)
        for hooks in list(_module_hooks):
            hooks.leave(module)
        return
    for parameter in module._parameters.values():
        if issubclass(type(parameter), Pending):
            wait_for(parameter)  # type: ignore[arg-type]
        elif type(parameter) is Tensor and any_pending():
            wait_for_parameters()


_LOOK_BELOW = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class ModuleHooks:
    """Runs ``wait_module`` before the forward of every module that owns parameters.

    torch calls a module without hooks by a shorter way, so they are there only while needed.

    Args:
        modules: get the hooks, ahead of the user's own.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._hooks: dict[int, tuple[Any, RemovableHandle]] = {}
        self.move_to(modules)
        _module_hooks.add(self)

    def move_to(self, modules: Iterable[nn.Module]) -> None:
        """Gives the hooks to these modules, and takes them from those before."""
        self.remove()
        self._hooks = {
            id(module): (
                module._forward_pre_hooks,
                module.register_forward_pre_hook(wait_module, prepend=True),
            )
            for module in modules
            if isinstance(module, _LOOK_BELOW)
            or any(parameter is not None for parameter in module._parameters.values())
        }
        self._there = True

    def __repr__(self) -> str:
        return f"ModuleHooks({len(self._hooks)} modules, {'on' if self._there else 'off'})"

    def put(self) -> None:
        """Puts the hooks on all modules, ahead of the user's own."""
        if not self._there:
            for hooks, handle in self._hooks.values():
                hooks[handle.id] = wait_module
                hooks.move_to_end(handle.id, last=False)
            self._there = True

    def leave(self, module: nn.Module) -> None:
        """Takes the hooks off this module and all below it, until they are put on again."""
        for inner in module.modules():
            if (known := self._hooks.get(id(inner))) is not None:
                known[1].remove()
        self._there = False

    def remove(self) -> None:
        """Takes the hooks off all modules."""
        for _, handle in self._hooks.values():
            handle.remove()
        self._there = False


_module_hooks: weakref.WeakSet[ModuleHooks] = weakref.WeakSet()
