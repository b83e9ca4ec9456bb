"""Writes messages as bytes: ``.caffemodel``, ``.solverstate`` and mean files."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from soonest.caffe.message import REAL, Message
from soonest.caffe.schema import Field
from soonest.caffe.wire.types import LENGTH, type_of

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
    size = 0
    for field in message.schema.by_number.values():
        if not message.has(field.name):
            continue
        value = message.values[field.name]
        values = value if field.repeated else [value]
        if field.packed:
            own: list[bytes | memoryview] = [_packed(field, values)]
            size += _delimited(field, own, len(own[0]), pieces)
        elif field.kind == "message":
            for one in values:
                own = []
                size += _delimited(field, own, _encode(one, own), pieces)
        elif type_of(field.kind) == LENGTH:
            for one in values:
                raw = one if isinstance(one, bytes) else one.encode("utf-8", "surrogateescape")
                size += _delimited(field, [raw], len(raw), pieces)
        else:
            tag = _to_varint(field.number << 3 | type_of(field.kind))
            for one in values:
                piece = tag + _scalar(field, one)
                pieces.append(piece)
                size += len(piece)
    return size


def _delimited(
    field: Field, own: list[bytes | memoryview], length: int, pieces: list[bytes | memoryview]
) -> int:
    head = _to_varint(field.number << 3 | LENGTH) + _to_varint(length)
    pieces.append(head)
    pieces.extend(own)
    return len(head) + length


def _packed(field: Field, values: Any) -> bytes | memoryview:
    if field.kind in REAL:
        array = np.ascontiguousarray(values, dtype=REAL[field.kind])
        return array.data.cast("B")
    return b"".join(_scalar(field, one) for one in values)


def _scalar(field: Field, value: Any) -> bytes:
    if field.kind == "float":
        return struct.pack("<f", value)
    if field.kind == "double":
        return struct.pack("<d", value)
    if field.kind == "enum":
        value = field.enum.values[value]
    return _to_varint(int(value) & 0xFFFFFFFFFFFFFFFF)


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
