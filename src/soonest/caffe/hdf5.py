"""HDF5 files, as Caffe writes weights and states with ``snapshot_format: HDF5``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from soonest.caffe.blobs import Array
from soonest.caffe.files import read_bytes, replaced

MAGIC = b"\x89HDF\r\n\x1a\n"
_MOST_DEEP = 20


def is_hdf5(path: str | Path) -> bool:
    """Whether a file is HDF5: by its name, as in Caffe, or by how it starts."""
    if Path(path).suffix == ".h5":
        return True
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@contextmanager
def open_to_read(path: str | Path, what: str) -> Iterator[Any]:
    """Opens a file.

    Args:
        path: relative to the working directory.
        what: it should be, for errors.

    Raises:
        ValueError: it is none, or something in it cannot be read.
    """
    h5py = _library()
    read_bytes(path, what, limit=1)  # Says in our words that it is not there.
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        if str(path) in str(error):
            raise ValueError(str(error)) from None
        raise ValueError(f"cannot read {path}, {what}, as HDF5: {error}") from None


def numbered(group: Any, what: str) -> dict[int, Array]:
    """The datasets ``0``, ``1``, … of a group, in this order, as float32.

    Raises:
        ValueError: others are in it, or they are not of numbers.
    """
    h5py = _library()
    found: dict[int, Array] = {}
    for name in sorted(group, key=lambda name: (len(name), name)):
        data = group[name]
        is_array = isinstance(data, h5py.Dataset) and data.dtype.kind in "fiu"
        if not name.isdecimal() or not is_array:
            raise ValueError(f"{what} has {name!r} in it, which is no blob")
        found[int(name)] = np.asarray(data[()], dtype=np.float32)
    return found


def layers(group: Any, what: str) -> dict[str, dict[int, Array]]:
    """The blobs of every layer below a group, by name of the layer, which may hold slashes."""
    h5py = _library()
    found: dict[str, dict[int, Array]] = {}

    def walk(within: Any, prefix: str, depth: int) -> None:
        for name in within:
            inner = within[name]
            if not isinstance(inner, h5py.Group) or depth > _MOST_DEEP:
                raise ValueError(f"{what}: {prefix + name!r} is no layer")
            if any(isinstance(inner[key], h5py.Group) for key in inner):
                walk(inner, f"{prefix}{name}/", depth + 1)
            else:
                found[prefix + name] = numbered(inner, f"layer {prefix + name!r} of {what}")

    walk(group, "", 0)
    return found


@contextmanager
def open_to_write(path: str | Path) -> Iterator[Any]:
    """Opens a new file, which takes its place once it is whole."""
    with replaced(path) as new, _library().File(new, "w", libver="earliest") as file:
        yield file


def _library() -> Any:
    try:
        import h5py
    except ImportError:
        raise ValueError("HDF5 files need h5py: pip install 'soonest[caffe]'") from None
    return h5py
