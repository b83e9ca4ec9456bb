"""Transforms of ``torch.func`` wrap tensors without asking them: what is in flight lands before."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from soonest.runtime.guard import pending

_WRAPPERS = ("_wrap_tensor_for_grad", "_maybe_wrap_functional_tensor")
"""What ``grad``, ``vjp``, ``jacrev``, ``hessian`` and ``functionalize`` do to each argument; the
other transforms call operators, which the guard sees."""


@cache
def land_first() -> None:
    """From now on, in this process, arguments in flight land before they are wrapped."""
    from torch._functorch import eager_transforms

    for name in _WRAPPERS:
        wrap = getattr(eager_transforms, name, None)
        if wrap is not None:
            setattr(eager_transforms, name, _landing(wrap))


def _landing(wrap: Callable[..., Any]) -> Callable[..., Any]:
    def landing(argument: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(argument, Tensor) and pending.is_held(argument):
            pending.land(argument)
        return wrap(argument, *args, **kwargs)

    # What is compiled has landed where it was entered, and goes on as if nothing were here.
    torch.compiler.substitute_in_graph(landing, skip_signature_check=True)(wrap)
    return landing
