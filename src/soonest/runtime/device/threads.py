"""The threads that work beside the user's, and how they end with the process.

One that is inside a backend when the interpreter goes away takes the process with it, by an abort.
So the process waits for all of them before it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

PROCESS_ENDS = threading.Event()
"""Set when the process is about to end: helpers then return as soon as they can."""


class Helper(threading.Thread):
    """A thread that does not keep the process alive; it starts at once.

    Args:
        run: what it does.
        name: follows ``soonest`` in its own.
        release: called to end its waits where it does not return when the process ends.
    """

    def __init__(
        self, run: Callable[[], None], name: str, release: Callable[[], None] | None = None
    ) -> None:
        super().__init__(target=run, name=f"soonest {name}", daemon=True)
        self.release = release
        self.start()


def end(limit_s: float, hurry_s: float) -> bool:
    """Waits for all helpers, as the process is about to end.

    Args:
        limit_s: how long they may go on with what they do.
        hurry_s: how long they may take after that.

    Returns:
        Whether there were any.
    """
    helpers = [thread for thread in threading.enumerate() if isinstance(thread, Helper)]
    _join(helpers, limit_s)
    PROCESS_ENDS.set()
    for helper in helpers:
        if helper.is_alive() and helper.release is not None:
            helper.release()
    _join(helpers, hurry_s)
    return bool(helpers)


def _join(threads: Sequence[threading.Thread], limit_s: float) -> None:
    over_at = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, over_at - time.monotonic()))
