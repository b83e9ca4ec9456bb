"""HDF5 files, as Caffe writes weights and states with ``snapshot_format: HDF5``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from soonest.caffe.files import read_bytes, replaced
from soonest.caffe.io.blobs import Array

MAGIC = b"\x89HDF\r\n\x1a\n"
_MOST_DEEP = 20
_MOST_PACKED = 1100
"""How many times smaller than its values a dataset may be: its compression reaches 1032."""


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
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if str(path) in str(error):
            raise ValueError(str(error)) from None
        raise ValueError(f"cannot read {path}, {what}, as HDF5: {error}") from None


def values(data: Any, what: str, dtype: Any = np.float32) -> npt.NDArray[Any]:
    """All of a dataset.

    Args:
        data: the dataset.
        what: it is, for errors.
        dtype: of the result.

    Raises:
        ValueError: it is not of numbers, or claims many more than it can have.
    """
    is_array = isinstance(data, _library().Dataset) and data.shape is not None
    if not is_array or data.dtype.kind not in "fiu":
        raise ValueError(f"{what} is no array of numbers")
    return np.asarray(_read(data, what), dtype=dtype)


def word(data: Any, what: str) -> str:
    """The text in a dataset.

    Raises:
        ValueError: there is none.
    """
    h5py = _library()
    is_array = isinstance(data, h5py.Dataset) and data.shape is not None
    found = _read(data, what) if is_array else None
    if not isinstance(found, bytes | str):
        raise ValueError(f"{what} is no text")
    return found.decode("utf-8", "surrogateescape") if isinstance(found, bytes) else found


def _read(data: Any, what: str) -> Any:
    """A small file must not fill memory by claiming values that it has not."""
    claimed, stored = data.size * data.dtype.itemsize, data.id.get_storage_size()
    if claimed > _MOST_PACKED * stored:
        raise ValueError(
            f"{what} has {stored} bytes, but its shape {list(data.shape)} asks for {claimed}: "
            "the file is damaged"
        )
    return data[()]


def numbered(group: Any, what: str) -> dict[int, Array]:
    """The datasets ``0``, ``1``, … of a group, in this order, as float32.

    Raises:
        ValueError: others are in it, or they are not of numbers.
    """
    if not isinstance(group, _library().Group):
        raise ValueError(f"{what} is no group of blobs")
    return _blobs(group, list(group), what)


def _blobs(group: Any, names: list[str], what: str) -> dict[int, Array]:
    found: dict[int, Array] = {}
    # Names that are no text come as bytes.
    if odd := [name for name in names if not (isinstance(name, str) and name.isdecimal())]:
        raise ValueError(f"{what} has {odd[0]!r} in it, which is no blob")
    for name in sorted(names, key=lambda name: (len(name), name)):
        found[int(name)] = values(group[name], f"blob {name} of {what}")
    return found


def layers(group: Any, what: str) -> dict[str, dict[int, Array]]:
    """The blobs of every layer below a group, by name of the layer.

    A name may hold slashes: then its group is inside of others, which may be layers, too.

    Raises:
        ValueError: something else is in it.
    """
    h5py = _library()
    if not isinstance(group, h5py.Group):
        raise ValueError(f"'data' of {what} is no group of layers")
    found: dict[str, dict[int, Array]] = {}

    def walk(within: Any, name: str, depth: int) -> None:
        if depth > _MOST_DEEP:
            raise ValueError(f"{what}: {name!r} is no layer")
        inner = [key for key in within if isinstance(within[key], h5py.Group)]
        blobs = [key for key in within if key not in inner]
        if blobs and not name:
            raise ValueError(f"{what}: {blobs[0]!r} is no layer")
        if name and (blobs or not inner):
            found[name] = _blobs(within, blobs, f"layer {name!r} of {what}")
        for key in inner:
            walk(within[key], f"{name}/{key}" if name else key, depth + 1)

    walk(group, "", 0)
    return found


@contextmanager
def open_to_write(path: str | Path) -> Iterator[Any]:
    """Opens a new file, which takes its place once it is whole."""
    with replaced(path) as new, _library().File(new, "w", libver="earliest") as file:
        yield file


def append(path: str, tables: dict[str, Array], *, new: bool) -> None:
    """Writes rows behind those that datasets have.

    Args:
        path: of the file.
        tables: the rows, by name of the dataset.
        new: whether to begin the file anew.

    Raises:
        ValueError: it cannot be written, or rows have another shape than those before.
    """
    try:
        with _library().File(path, "w" if new else "a") as file:
            for name, rows in tables.items():
                if name not in file:
                    file.create_dataset(name, data=rows, maxshape=(None, *rows.shape[1:]))
                    continue
                data, before = file[name], len(file[name])
                if data.shape[1:] != rows.shape[1:]:
                    raise ValueError(
                        f"rows of {name!r} in {path} have the shape {list(data.shape[1:])}, so "
                        f"none of {list(rows.shape[1:])} can be put behind them"
                    )
                data.resize(before + len(rows), axis=0)
                data[before:] = rows
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}") from None


def _library() -> Any:
    try:
        import h5py
    except ImportError:
        raise ValueError("HDF5 files need h5py: pip install 'soonest[caffe]'") from None
    return h5py
