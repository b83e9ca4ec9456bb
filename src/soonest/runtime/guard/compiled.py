"""Modules that ``torch.compile`` has compiled wait at their entry for the parameters inside.

Compiled code reads memory without asking anybody, and hooks inside it would break it up.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from torch import nn

from soonest.runtime.guard import pending
from soonest.runtime.guard.hooks import Calling

_NOTHING_OVERLAPS = (
    "the model is compiled as a whole, so its gradients come all at once, and reducing them "
    "overlaps nothing: compile its blocks instead, or "
    "torch.compile(soonest.DistributedDataParallel(model))"
)


class Entries:
    """The compiled modules of a model; entering one waits for all parameters in it.

    Args:
        model: in which to look for them.

    Attributes:
        whole: the model itself is compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        _stay_out_of_compiled_regions()
        self._model = model
        self._undo: list[Callable[[], None]] = []
        self.renew()

    def renew(self) -> None:
        """Looks for compiled modules anew, as the model is now."""
        self.remove()
        compiled = [module for module in self._model.modules() if _is_compiled(module)]
        self.whole = self._model in compiled
        if self.whole:
            warnings.warn(_NOTHING_OVERLAPS, stacklevel=2)
        inside = {id(inner) for module in compiled for inner in module.modules()}
        self._plain = [module for module in self._model.modules() if id(module) not in inside]
        for module in compiled:
            self._undo.append(_intercept(module))

    def outside(self) -> Iterator[nn.Module]:
        """Iterates over the modules that are in no compiled one."""
        return iter(self._plain)

    def outdated(self) -> bool:
        """Whether more modules have been compiled in place since."""
        return any(module._compiled_call_impl is not None for module in self._plain)

    def remove(self) -> None:
        """Lets modules be entered without waiting again."""
        for undo in self._undo:
            undo()
        self._undo = []


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(type(module), "_opt_mod_attributes")


def _intercept(module: nn.Module) -> Callable[[], None]:
    """Waits for a module's parameters before each call; returns what undoes that."""
    wait_all = partial(_wait_for_all, module)
    compiled: Any = module._compiled_call_impl
    if compiled is None:  # a module around the compiled one, with hooks that are not compiled
        return module.register_forward_pre_hook(Calling(wait_all), prepend=True).remove

    def call(*args: Any, **kwargs: Any) -> Any:
        wait_all()
        _entered.modules += 1
        try:
            return compiled(*args, **kwargs)
        finally:
            _entered.modules -= 1

    module._compiled_call_impl = call
    return partial(setattr, module, "_compiled_call_impl", compiled)


def _wait_for_all(module: nn.Module, *_: Any) -> None:
    for parameter in module.parameters():
        if pending.is_pending(parameter):
            pending.wait_for(parameter)


@cache
def _stay_out_of_compiled_regions() -> None:
    """Lets ``torch.compile`` compile the user's modules and leave the code around them alone."""
    from torch._dynamo import trace_rules  # takes seconds to import, where no optimizer has yet

    trace_rules.add("soonest.runtime")
    _wait_before_functions()


class _Entered(threading.local):
    """Counts the compiled modules that this thread is in: what they own is ready."""

    modules = 0


_entered = _Entered()


def _wait_before_functions() -> None:
    """Lets all compiled functions of this process wait for their arguments before they are entered.

    So they find plain tensors, as with ``DistributedDataParallel``, and are compiled to the same
    code. One that is given no tensor, as ``torch.compile(optimizer.step)``, may read anything.
    """
    from torch._dynamo import eval_frame

    chosen = getattr(eval_frame, "_callback_from_stance", None)
    if chosen is None:
        return

    def after_waiting(callback: Any) -> Any:
        if pending.any_pending() and callback not in (None, False) and not _entered.modules:
            given = sys._getframe(1).f_locals
            tensors = list(pending.tensors_in((given.get("args", ()), given.get("kwargs", {}))))
            pending.wait_all(tensors or None)
        return chosen(callback)

    eval_frame._callback_from_stance = after_waiting
