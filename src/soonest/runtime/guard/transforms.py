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
def wait_first() -> None:
    """From now on, in this process, arguments in flight land before they are wrapped."""
    from torch._functorch import eager_transforms

    for name in _WRAPPERS:
        wrap = getattr(eager_transforms, name, None)
        if wrap is not None:
            setattr(eager_transforms, name, _in_flight(wrap))


def _in_flight(wrap: Callable[..., Any]) -> Callable[..., Any]:
    def in_flight(argument: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(argument, Tensor) and pending.is_pending(argument):
            pending.wait_for(argument)
        return wrap(argument, *args, **kwargs)

    # What is compiled has landed where it was entered, and goes on as if nothing were here.
    torch.compiler.substitute_in_graph(in_flight, skip_signature_check=True)(wrap)
    return in_flight
