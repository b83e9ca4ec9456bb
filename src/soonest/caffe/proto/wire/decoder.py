"""Reads messages from bytes: ``.caffemodel``, ``.solverstate`` and mean files.

Protobuf's runtime reads them, but for large arrays: it would copy these. So they are cut out before
and put back afterwards, as arrays that look into the file.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from soonest.caffe.files import Bytes
from soonest.caffe.proto.message import REAL, Message
from soonest.caffe.proto.protobuf import CLASSES, DecodeError, from_protobuf
from soonest.caffe.proto.schema import MESSAGES, MessageType
from soonest.caffe.proto.wire.types import (
    CLOSE,
    FIXED32,
    FIXED64,
    LENGTH,
    OPEN,
    VARINT,
    has_arrays,
    is_array,
    to_varint,
)  # fmt: skip

MOST_BYTES = 2**22
"""Besides arrays. No net has as many; a hostile file could fill memory with the values in them."""
_MESSAGE_BYTES = 16
"""How many of these a message counts for, as it takes memory even if it is empty."""
_FIXED_BYTES = {FIXED32: 4, FIXED64: 8}

Cut = dict[str, list[Any]]
"""What has been cut out of a message, by field: pieces of an array, or what was cut out of messages
within, in their order."""


class WireError(ValueError):
    """Bytes that cannot be read.

    Attributes:
        offset_bytes: where that shows, from the start of the file; where the message starts if
            nothing says more.
    """

    def __init__(self, file: str, offset_bytes: int, what: str) -> None:
        super().__init__(f"{file}, byte {offset_bytes}: {what}")
        self.offset_bytes = offset_bytes


def decode(data: Bytes, type_name: str, *, file: str = "bytes") -> Message:
    """Reads a message.

    Packed numbers with a fraction become arrays that look into ``data``: they are not copied and
    cannot be written.
    Fields that Caffe does not know are skipped, since other versions of it wrote them.

    Args:
        data: all of a file, possibly mapped.
        type_name: of the message, for example ``"NetParameter"``.
        file: its name, for errors.

    Raises:
        WireError: it is not such a message; the error says where and why.
    """
    return _Decoder(data, file).message(MESSAGES[type_name])


class _Decoder:
    """One pass over bytes."""

    def __init__(self, data: Bytes, file: str) -> None:
        self._data = data
        self._file = file
        self._kept_bytes = 0

    def message(self, type_: MessageType) -> Message:
        cut: Cut = {}
        data = self._without(type_, 0, len(self._data), cut)
        found = CLASSES[type_.name]()
        try:
            found.ParseFromString(data)
        except DecodeError:
            self._fail(0, f"this is no {type_.name}, or it is cut off or damaged")
        for path in found.FindInitializationErrors():
            self._fail(0, f"{type_.name} lacks its field {path!r}")
        message = from_protobuf(found)
        _put_back(message, cut)
        return message

    def _fail(self, at: int, what: str) -> NoReturn:
        raise WireError(self._file, at, what)

    def _without(self, type_: MessageType, at: int, end: int, cut: Cut) -> bytes:
        """The bytes of a message without its arrays, which go into ``cut``."""
        if not has_arrays(type_):
            return self._data[at:end]
        kept = bytearray()
        while at < end:
            key, after = self._varint(at, end)
            number, wire = key >> 3, key & 7
            if not 0 < number < 2**29 or wire > FIXED32:
                self._fail(at, f"no field can start with {key}: this is no such file, or damaged")
            field = type_.by_number.get(number)
            if wire in (OPEN, CLOSE) or (field and is_array(field) and wire != LENGTH):
                # A group, as no file of today has one, or numbers one by one, as old files have
                # them: protobuf's runtime reads them, and all that follows.
                kept += self._data[at:end]
                break
            if wire == VARINT:
                start = stop = self._varint(after, end)[1]
            else:
                start, stop = self._stretch(wire, after, end, field.name if field else number)
            if wire == LENGTH and field and is_array(field):
                self._array(cut, field.name, REAL[field.kind], start, stop)
            elif wire == LENGTH and field and field.kind == "message" and has_arrays(field.message):
                inner: Cut = {}
                rest = self._without(field.message, start, stop, inner)
                cut.setdefault(field.name, []).append(inner)
                kept += self._data[at:after] + to_varint(len(rest)) + rest
                self._kept_bytes += _MESSAGE_BYTES
            else:
                self._kept_bytes += stop - at
                kept += self._data[at:stop]
            if self._kept_bytes > MOST_BYTES:
                self._fail(at, f"more than {MOST_BYTES} bytes besides arrays: this is no such file")
            at = stop
        return bytes(kept)

    def _array(self, cut: Cut, name: str, dtype: np.dtype[Any], start: int, stop: int) -> None:
        count, rest = divmod(stop - start, dtype.itemsize)
        if rest:
            self._fail(
                start, f"{stop - start} bytes are no whole number of {dtype.name}s: it is damaged"
            )
        if count:
            cut.setdefault(name, []).append(np.frombuffer(self._data, dtype, count, start))

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        start = at
        while at < end:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
            shift += 7
            if shift >= 70:
                self._fail(start, "a number has more than 10 bytes: the file is damaged")
        return self._fail(start, "the data ends within a number: the file is cut off or damaged")

    def _stretch(self, wire: int, at: int, end: int, what: str | int) -> tuple[int, int]:
        """Where a value of known length starts and stops."""
        if wire == LENGTH:
            length, start = self._varint(at, end)
        else:
            length, start = _FIXED_BYTES[wire], at
        if length > end - start:
            self._fail(
                at,
                f"field {what!r} has {length} bytes, but {end - start} are left: the file is cut "
                "off",
            )
        return start, start + length


def _put_back(message: Message, cut: Cut) -> None:
    for name, parts in cut.items():
        field = message.schema.fields[name]
        if field.kind == "message":
            inner = message.values[name]
            if field.repeated:
                for one, its in zip(inner, parts, strict=False):  # Behind a group none was cut.
                    _put_back(one, its)
            else:
                for its in parts[1:]:  # Protobuf has put these pieces of one message together.
                    for key, more in its.items():
                        parts[0].setdefault(key, []).extend(more)
                _put_back(inner, parts[0])
        else:
            arrays = [*parts, *([message.values[name]] if message.has(name) else [])]
            message.values[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
