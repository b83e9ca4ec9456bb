"""What ranks tell the process that started them: lines of JSON among the rest of their output."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from soonest.errors import SoonestError
from soonest.lab.hosts import Lab
from soonest.lab.loopback import Loopback

_MARK = "soonest-tells "
_REMEMBERED = 20

Take = Callable[[int, dict[str, Any]], None]
"""Called with a rank and what it told."""


def tell(kind: str, **content: Any) -> None:
    """Sends a message."""
    sys.stdout.write(f"{_MARK}{json.dumps({'kind': kind, **content})}\n")
    sys.stdout.flush()


def heard(line: str) -> dict[str, Any] | None:
    """The message in a line of a rank's output; None if it is something else."""
    return json.loads(line.removeprefix(_MARK)) if line.startswith(_MARK) else None


def listen(
    place: Lab | Loopback,
    command: Sequence[str],
    take: Take,
    *,
    say: Callable[[str], None],
    timeout_s: float,
    preload: bool | None = None,
) -> None:
    """Runs a command on every rank and takes what they tell, in the calling thread.

    Args:
        place: where to run it.
        command: program and arguments.
        take: gets the messages.
        say: if a rank fails or they do not end in time, gets what the ranks wrote last besides
            messages, line by line.
        timeout_s, preload: as for ``Lab.run``.

    Raises:
        SoonestError: a rank failed, or they did not end in time.
    """
    said: deque[str] = deque(maxlen=_REMEMBERED)

    def on_line(rank: int, line: str) -> None:
        message = heard(line)
        if message is None:
            said.append(f"[{rank}] {line}")
        else:
            take(rank, message)

    try:
        code = place.run(command, on_line=on_line, timeout_s=timeout_s, preload=preload)
    except TimeoutError as error:
        for line in said:
            say(line)
        raise SoonestError(f"this came to a stop: {error}") from None
    if code:
        for line in said:
            say(line)
        raise SoonestError(f"a rank ended with exit code {code}; see what it said above")
