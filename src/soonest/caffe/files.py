"""Files of any kind: read whole, and replaced only when the new one is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def read_bytes(path: str | Path, what: str, *, limit: int = -1) -> bytes:
    """All of a file, or its first bytes.

    Args:
        path: relative to the working directory, as in Caffe.
        what: it should be, for errors.
        limit: how many bytes; -1 for all.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise ValueError(
            f"cannot read {path}, {what}: {error.strerror}; paths are relative to the folder "
            f"in which the command runs, {Path.cwd()}"
        ) from None


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Gives a path beside this one to write to; afterwards the new file takes its place.

    Raises:
        ValueError: it cannot be written there.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield new
        os.replace(new, path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; make sure that its folder exists "
            "and is writable"
        ) from None
    finally:
        new.unlink(missing_ok=True)
