"""What stands on the wire, as far as large arrays are cut out of it and put into it.

The encoding is protobuf's: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from soonest.caffe.proto.message import REAL
from soonest.caffe.proto.schema import MESSAGES, Field, MessageType

VARINT, FIXED64, LENGTH, OPEN, CLOSE, FIXED32 = range(6)
"""What follows the number of a field: a number of variable length, 8 bytes, a length and so many
bytes, the start or the end of a group, 4 bytes."""


def is_array(field: Field) -> bool:
    """Whether a field is an array of numbers with a fraction, in one piece."""
    return field.packed and field.kind in REAL


def _with_arrays() -> frozenset[str]:
    found: set[str] = set()
    while True:
        more = {message.name for message in MESSAGES.values() if _has_one(message, found)}
        if more == found:
            return frozenset(found)
        found = more


def _has_one(message: MessageType, known: set[str]) -> bool:
    return any(is_array(one) or one.type_name in known for one in message.fields.values())


_WITH_ARRAYS = _with_arrays()


def has_arrays(type_: MessageType) -> bool:
    """Whether messages of a type, or those within them, have arrays."""
    return type_.name in _WITH_ARRAYS


def to_varint(value: int) -> bytes:
    """A number of variable length."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
