"""How a process ends that trains: what others wait for goes first, and nothing waits for ever."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Sequence

from soonest.errors import SoonestError
from soonest.runtime.comm import LOOK_S, never_free
from soonest.runtime.comm.error_text import said
from soonest.runtime.device import threads
from soonest.runtime.engine.engine import Engine

_log = logging.getLogger(__name__)
_QUIET_S = 5.0
"""So long it waits without a word."""
_HURRY_S = 2.0
"""So long it waits at all where Ctrl-C or an error has ended it."""
_THREADS_END_S = 1.0
_THREADS_FREE_S = 0.02


def finish(engines: Sequence[Engine]) -> None:
    """Lets a process end that has these.

    If an error ends it the other ranks are told, so that they name it. On Ctrl-C it leaves within
    seconds, and on a second one at once.
    """
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    interrupted, left = isinstance(error, KeyboardInterrupt), False
    try:
        for engine in engines:
            left |= not _send_the_rest(engine, error)
            _say_goodbye(engine, error)
            engine.lane.close()
        _end_threads()
    except KeyboardInterrupt:
        interrupted = left = True
    if interrupted and left:
        _leave()


def _send_the_rest(engine: Engine, error: BaseException | None) -> bool:
    """Whether nothing is in flight any more."""
    if engine.lane.error is not None:
        return False
    try:
        what = _under_way(engine, _HURRY_S if error else _QUIET_S)
        if what is not None and error is None:
            _log.warning(
                "this process ends when what other ranks need is sent, and waits for them: %s; "
                "Ctrl-C ends it at once",
                what,
            )
            what = _under_way(engine, math.inf)
    except SoonestError as failure:
        _log.error("at the end of this process: %s", failure)
        return False
    return what is None


def _under_way(engine: Engine, limit_s: float) -> str | None:
    """Waits until nothing is under way that other ranks need, or for so long.

    Returns:
        What is under way then, in words; None if nothing is.
    """
    if (what := engine.lane.waits_for(limit_s)) is not None:
        return what
    if engine.buffers is not None:
        engine.buffers.wait_sent()
    latest = engine.backward.latest
    if latest is not None and latest.users is not None:
        with engine.failures.together("ending"):
            if not latest.users.are_known(limit_s):
                return f"step {latest.number}: which parameters each rank has used"
    return None


def _say_goodbye(engine: Engine, error: BaseException | None) -> None:
    if error is not None and engine.lane.error is None:
        engine.failures.tell(said(error))
    if engine.failures.hosts_store and (error is not None or engine.lane.error is not None):
        engine.failures.wait_for_notes()


def _end_threads() -> None:
    """Nothing of ours may need the interpreter while that ends: it would abort the process."""
    any_were_there = threads.end(_THREADS_END_S, 2 * LOOK_S)
    never_free()
    if any_were_there:  # one that has been joined may need it to free what torch kept
        time.sleep(_THREADS_FREE_S)


def _leave() -> None:
    """Ends the process as Ctrl-C does, though the backend still waits for other ranks."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.kill(os.getpid(), signal.SIGINT)
