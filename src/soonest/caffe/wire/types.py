"""How values of each kind stand on the wire.

The encoding is protobuf's: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

VARINT, FIXED64, LENGTH, OPEN, CLOSE, FIXED32 = range(6)
"""What follows the number of a field: a number of variable length, 8 bytes, a length and so many
bytes, the start or the end of a group, 4 bytes."""

_TYPES = {"double": FIXED64, "float": FIXED32, "string": LENGTH, "bytes": LENGTH, "message": LENGTH}


def type_of(kind: str) -> int:
    """Which of these a kind of value is written as, by itself."""
    return _TYPES.get(kind, VARINT)
