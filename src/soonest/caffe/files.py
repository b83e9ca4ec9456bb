"""Files of any kind: read, and replaced only when the new one is whole."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from soonest import writing

Bytes = bytes | mmap.mmap
"""What stands in a file; an index gives a number, a slice gives bytes."""


def read_bytes(path: str | Path, what: str, *, limit: int = -1) -> bytes:
    """All of a file, or its first bytes.

    Args:
        path: relative to the working directory, as in Caffe.
        what: it should be, for errors.
        limit: how many bytes; -1 for all.

    Raises:
        ValueError: it cannot be read.
    """
    with _opened(path, what) as file:
        return file.read(limit)


def mapped(path: str | Path, what: str) -> Bytes:
    """All of a file, of which only that is read from the disk that is looked at.

    Args:
        path: relative to the working directory, as in Caffe.
        what: it should be, for errors.

    Raises:
        ValueError: it cannot be read.
    """
    with _opened(path, what) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # It is empty, or no plain file.
            return file.read()


@contextmanager
def _opened(path: str | Path, what: str) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
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
    try:
        with writing.replaced(path) as new:
            yield new
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; make sure that its folder exists "
            "and is writable"
        ) from None
