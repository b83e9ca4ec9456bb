"""What several commands read from their arguments, and how they say that it was wrong."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

NO_PICTURES = "pictures need matplotlib: pip install 'soonest[report]'"


class WrongRequestError(Exception):
    """The request cannot be carried out as it stands; the message says how to mend it."""


class FailedError(Exception):
    """The request was right, but carrying it out failed; the message says why."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        raise WrongRequestError(f"{message} (see '{self.prog} --help')")


def rate(text: str) -> float:
    """A link's rate, such as ``200mbit``, in bits per second."""
    from soonest.core.units import parse_rate

    try:
        return parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def duration(text: str) -> float:
    """A time such as ``11us``, in seconds."""
    from soonest.core.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least(lowest: int) -> Callable[[str], int]:
    """A type for ``add_argument``: a whole number, ``lowest`` or more."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < lowest:
            raise argparse.ArgumentTypeError(f"{number} is too few: give {lowest} or more")
        return number

    return whole_number


def factor(text: str) -> float:
    """A number above zero."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give a number above zero")
    return number


def new_file(text: str) -> Path:
    """A file to write; found out now that it cannot be, not after minutes of work."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {path.parent} to write {path.name} in")
    return path


def needs_lab() -> None:
    """Raises WrongRequestError where the lab cannot run."""
    from soonest.lab import unavailable

    if why := unavailable():
        raise WrongRequestError(why)
