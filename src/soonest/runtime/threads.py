"""The threads that work beside the user's."""

from __future__ import annotations

import threading
from collections.abc import Callable

THREADS = "soonest "
"""With which their names begin."""


def started(run: Callable[[], None], name: str) -> threading.Thread:
    """A thread that does not keep the process alive.

    Args:
        run: what it does.
        name: follows ``THREADS`` in its own.
    """
    thread = threading.Thread(target=run, name=f"{THREADS}{name}", daemon=True)
    thread.start()
    return thread
