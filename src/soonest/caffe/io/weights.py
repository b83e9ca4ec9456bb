"""Trained weights in files: ``.caffemodel`` and ``.caffemodel.h5``."""

from __future__ import annotations

from pathlib import Path

from soonest.caffe.files import mapped, read_bytes, replaced
from soonest.caffe.io import hdf5, upgrade
from soonest.caffe.io.blobs import Array, to_array
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message

Weights = dict[str, dict[int, Array]]
"""Per layer, by name, its blobs by number. A file in HDF5 has a blob that layers share only in the
first of them."""


def read(path: str | Path) -> Weights:
    """The weights in a file of any age, binary or HDF5.

    Those of a binary file are not copied: they look into it and cannot be written, and other
    programs must replace it, not write into it, as long as they are used.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    what = "trained weights"
    read_bytes(path, what, limit=1)
    if hdf5.is_hdf5(path):
        with hdf5.open_to_read(path, what) as file:
            if "data" not in file:
                raise ValueError(f"{path} has no group 'data': it holds no weights")
            return hdf5.layers(file["data"], str(path))
    message = read_message(path)
    return {
        layer.name: {
            number: to_array(blob, f"blob {number} of layer {layer.name!r} of {path}")
            for number, blob in enumerate(layer.blobs)
        }
        for layer in message.layer
    }


def read_message(path: str | Path) -> Message:
    """A ``.caffemodel`` of any age as a ``NetParameter`` in today's form.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    found = wire.decode(mapped(path, "trained weights"), "NetParameter", file=str(path))
    try:
        return upgrade.net(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_message(path: str | Path, message: Message) -> None:
    """Writes a message as bytes, for example a ``.caffemodel``.

    Raises:
        ValueError: it cannot be written.
    """
    data = wire.encode(message)
    with replaced(path) as new:
        new.write_bytes(data)


def write_hdf5(path: str | Path, data: Weights, diff: Weights | None = None) -> None:
    """Writes weights as HDF5.

    Args:
        path: of the file.
        data: of all layers, those without weights too, as Caffe does.
        diff: the gradients, in the same form, if they are wanted.

    Raises:
        ValueError: it cannot be written.
    """
    with hdf5.open_to_write(path) as file:
        for name, layers in (("data", data), ("diff", diff)):
            for layer, blobs in (layers or {}).items():
                group = file.require_group(f"{name}/{layer}")
                for number, array in blobs.items():
                    group.create_dataset(str(number), data=array)
