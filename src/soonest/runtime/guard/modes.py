"""Modes of torch in which updates must not run, though the thread that runs them may be in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame

_DEVICES = ("cpu", "cuda", "xpu")


def is_plain() -> bool:
    """Whether nothing watches or changes what this thread's operations do: no mode, no trace."""
    return not (
        _functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
    )


def is_compiling() -> bool:
    """Whether ``torch.compile`` compiles what this thread calls."""
    return get_eval_frame_callback() is not None


@contextmanager
def usual() -> Iterator[None]:
    """Leaves autocast, inference mode and ``torch.compile`` within this context."""
    with ExitStack() as stack:
        if is_compiling():
            stack.callback(set_eval_frame, set_eval_frame(None))
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        yield
