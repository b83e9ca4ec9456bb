"""Transforms of ``torch.func`` wrap tensors past the guard, so they wait for pending ones first."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from soonest.runtime.guard import pending

_WRAPPERS = ("_wrap_tensor_for_grad", "_maybe_wrap_functional_tensor")
"""The functions by which ``grad``, ``vjp``, ``jacrev``, ``hessian`` and ``functionalize`` wrap each
argument. The other transforms call operators, which the guard sees."""


@cache
def wait_first() -> None:
    """Lets transforms in this process wait for pending arguments from now on."""
    from torch._functorch import eager_transforms

    for name in _WRAPPERS:
        wrap = getattr(eager_transforms, name, None)
        if wrap is not None:
            setattr(eager_transforms, name, _waiting(wrap))


def _waiting(wrap: Callable[..., Any]) -> Callable[..., Any]:
    def waiting(argument: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(argument, Tensor) and pending.is_pending(argument):
            pending.wait_for(argument)
        return wrap(argument, *args, **kwargs)

    # Compiled code has waited where it was entered, and goes on as if nothing were here.
    torch.compiler.substitute_in_graph(waiting, skip_signature_check=True)(wrap)
    return waiting
