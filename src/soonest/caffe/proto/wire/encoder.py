"""Writes messages as bytes: ``.caffemodel``, ``.solverstate`` and mean files.

Protobuf's runtime writes them, but for large arrays: it would keep every number as a value of its
own first.
"""

from __future__ import annotations

import numpy as np

from soonest.caffe.proto.message import REAL, Message
from soonest.caffe.proto.protobuf import to_protobuf
from soonest.caffe.proto.wire.types import LENGTH, has_arrays, is_array, to_varint

MOST_BYTES = 2**31 - 1
"""Of a message, as in protobuf: Caffe reads no longer ones."""


def encode(message: Message) -> bytes:
    """A message as bytes, fields by number, as protobuf writes it.

    Raises:
        ValueError: it is longer than protobuf, and with it Caffe, can read.
    """
    pieces: list[bytes | memoryview] = []
    size = _encode(message, pieces)
    if size > MOST_BYTES:
        raise ValueError(
            f"{message.schema.name} has {size} bytes, more than the {MOST_BYTES} that the binary "
            "format allows: write it as HDF5"
        )
    return b"".join(pieces)


def _encode(message: Message, pieces: list[bytes | memoryview]) -> int:
    """Appends the bytes of a message and says how many they are."""
    if not has_arrays(message.schema):
        pieces.append(to_protobuf(message).SerializePartialToString())
        return len(pieces[-1])
    size = 0
    for field in message.schema.by_number.values():
        if not message.has(field.name):
            continue
        value = message.values[field.name]
        if is_array(field):
            own: list[bytes | memoryview] = [
                np.ascontiguousarray(value, dtype=REAL[field.kind]).data.cast("B")
            ]
            size += _delimited(field.number, own, len(own[0]), pieces)
        elif field.kind == "message" and has_arrays(field.message):
            for one in value if field.repeated else [value]:
                own = []
                size += _delimited(field.number, own, _encode(one, own), pieces)
        else:
            alone = Message(message.schema)
            alone.values[field.name] = value
            pieces.append(to_protobuf(alone).SerializePartialToString())
            size += len(pieces[-1])
    return size


def _delimited(
    number: int,
    own: list[bytes | memoryview],
    length: int,
    pieces: list[bytes | memoryview],
) -> int:
    head = to_varint(number << 3 | LENGTH) + to_varint(length)
    pieces.append(head)
    pieces.extend(own)
    return len(head) + length
