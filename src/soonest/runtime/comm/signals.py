"""Tells errors that the user's signal handlers raise while we wait from those of a backend."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any


def is_from_handler(error: BaseException) -> bool:
    """Whether a signal handler raised this, wherever it interrupted us.

    torch's own of a ``DataLoader``, for one, raises when a worker has died.
    """
    handlers = set(_handlers())
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _handlers() -> Iterator[CodeType]:
    """The code of all signal handlers that are functions of Python."""
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        handler = getattr(handler, "__func__", handler)
        function = handler if isinstance(handler, FunctionType) else type(handler).__call__
        code = getattr(function, "__code__", None)
        if code is not None:
            yield code
