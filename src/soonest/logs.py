"""What soonest logs, and where: loggers named as modules are, below ``soonest``."""

from __future__ import annotations

import logging
import os

VARIABLE = "SOONEST_LOG"
_LEVELS = ("debug", "info", "warning", "error")


def level() -> int | None:
    """The level from which on things are logged, as the environment says; None if it says nothing.

    Raises:
        ValueError: it is no level.
    """
    text = os.environ.get(VARIABLE, "").strip().lower()
    if not text:
        return None
    if text not in _LEVELS:
        raise ValueError(f"{VARIABLE} is {text!r}, but must be one of {', '.join(_LEVELS)}")
    return logging.getLevelNamesMapping()[text.upper()]


def follow_environment(rank: int) -> None:
    """Shows on standard error what the environment asks for, where nothing else shows it.

    Args:
        rank: of this process; it stands in every line.

    Raises:
        ValueError: what the environment says is no level.
    """
    asked = level()
    if asked is None:
        return
    top = logging.getLogger("soonest")
    top.setLevel(asked)
    if not top.hasHandlers():  # otherwise the user has said where lines go
        handler = logging.StreamHandler()
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s soonest rank {rank} %(levelname)s: %(message)s")
        )
        top.addHandler(handler)
