"""Arrays in files: Caffe's blobs as NumPy arrays and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from soonest.caffe.files import read_bytes
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message

Array = npt.NDArray[np.float32]

_LEGACY = ("num", "channels", "height", "width")
MOST_AXES = 32
"""Of a blob, as in Caffe."""


def shape_of(blob: Message) -> tuple[int, ...]:
    """The shape of a stored blob; old files give four numbers, new ones a list."""
    if any(blob.has(name) for name in _LEGACY):
        return tuple(getattr(blob, name) for name in _LEGACY)
    return tuple(blob.shape.dim)


def to_array(blob: Message, what: str) -> Array:
    """The values of a ``BlobProto``.

    Args:
        blob: the message.
        what: it is, for errors.

    Returns:
        float32, possibly a view into the file that cannot be written.

    Raises:
        ValueError: shape and values do not fit.
    """
    shape = shape_of(blob)
    if len(shape) > MOST_AXES or any(size < 0 for size in shape):
        raise ValueError(f"{what} has the shape {list(shape[:40])}, which no blob can have")
    double = blob.has("double_data")
    values = np.asarray(blob.double_data if double else blob.data, dtype=np.float32)
    if len(values) != math.prod(shape):
        raise ValueError(
            f"{what} has {len(values)} values, but its shape {list(shape)} asks for "
            f"{math.prod(shape)}: the file is damaged"
        )
    return values.reshape(shape)


def read_array(path: str, what: str) -> Array:
    """The array in a file with one blob, a ``.binaryproto``.

    Args:
        path: of the file.
        what: it is, for errors.

    Raises:
        ValueError: it cannot be read.
    """
    return to_array(wire.decode(read_bytes(path, what), "BlobProto", file=path), path)


def to_blob(array: Any, diff: Any = None) -> Message:
    """A ``BlobProto`` with the values, and the gradient if there is one, of an array."""
    array = np.asarray(array)
    blob = Message("BlobProto", data=array)
    blob.put("shape").dim = list(array.shape)
    if diff is not None:
        blob.diff = np.asarray(diff)
    return blob


def fits(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a stored blob may be copied into one of another shape.

    It may if both are the same but for ones in front, as old files have them: (1, 1, 1, 10) for
    (10).
    """
    if stored == wanted:
        return True
    return len(stored) == 4 and len(wanted) <= 4 and stored == (1,) * (4 - len(wanted)) + wanted
