"""Files of the user's: written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Gives a path beside this one to write to; afterwards the new file takes its place.

    So nobody ever sees a part of it, and what was there stays if the disk is full.

    Raises:
        OSError: it cannot be written there.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text, in UTF-8.

    Raises:
        OSError: it cannot be written there.
    """
    with replaced(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Writes data as JSON that people can read.

    Raises:
        OSError: it cannot be written there.
    """
    write_text(path, json.dumps(data, indent=1) + "\n")
