"""How far a tool is: a bar where someone looks on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items as they are, with a bar on a terminal; elsewhere Caffe's log lines must do.

    Args:
        items: to go through.
        what: is done to them.
        total: how many there are, if that is known.
    """
    if not sys.stderr.isatty():
        return iter(items)
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return iter(items)
    console = Console(stderr=True)
    return iter(track(items, what, total=total, console=console, transient=True))
