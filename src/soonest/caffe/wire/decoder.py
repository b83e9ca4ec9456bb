"""Reads messages from bytes: ``.caffemodel``, ``.solverstate`` and mean files."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from soonest.caffe.files import Bytes
from soonest.caffe.message import REAL, Message
from soonest.caffe.schema import MESSAGES, Field, MessageType
from soonest.caffe.wire.types import CLOSE, FIXED32, FIXED64, LENGTH, OPEN, VARINT, type_of

MOST_NESTED = 100
"""Messages within messages, as in protobuf."""
MOST_VALUES = 1_000_000
"""Besides numbers with a fraction. No net has as many; a hostile file could fill memory with
them."""

_FIXED_BYTES = {FIXED32: 4, FIXED64: 8}


class WireError(ValueError):
    """Bytes that cannot be read, and where.

    Attributes:
        offset_bytes: from the start of the file.
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
        self._values = 0

    def message(self, type_: MessageType) -> Message:
        return self._message(type_, 0, len(self._data), 0)

    def _keep(self, values: dict[str, Any], field: Field, value: Any, at: int) -> None:
        self._values += 1
        if self._values > MOST_VALUES:
            self._fail(at, f"more than {MOST_VALUES} values: this is no such file, or damaged")
        if field.repeated:
            values.setdefault(field.name, []).append(value)
        else:
            values[field.name] = value

    def _fail(self, at: int, what: str) -> NoReturn:
        raise WireError(self._file, at, what)

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

    def _tag(self, at: int, end: int) -> tuple[int, int, int]:
        key, after = self._varint(at, end)
        number, wire = key >> 3, key & 7
        if not 0 < number < 2**29 or wire > FIXED32:
            self._fail(at, f"no field can start with {key}: this is no such file, or damaged")
        return number, wire, after

    def _stretch(self, wire: int, at: int, end: int, what: str) -> tuple[int, int]:
        """Where a value of known length starts and stops."""
        if wire == LENGTH:
            length, start = self._varint(at, end)
        else:
            length, start = _FIXED_BYTES[wire], at
        if length > end - start:
            self._fail(
                at, f"{what} has {length} bytes, but {end - start} are left: the file is cut off"
            )
        return start, start + length

    def _message(self, type_: MessageType, at: int, end: int, depth: int) -> Message:
        found = Message(type_)
        begin = at
        pieces: dict[str, list[Any]] = {}
        while at < end:
            number, wire, after = self._tag(at, end)
            field = type_.by_number.get(number)
            if wire == CLOSE:
                self._fail(at, "a group ends that did not start: the file is damaged")
            if field is None or not _fits(field, wire):
                at = self._skip(number, wire, after, end, depth)
            else:
                at = self._value(found, field, wire, after, end, depth, pieces)
        for name, parts in pieces.items():
            arrays = [np.frombuffer(part, REAL[type_.fields[name].kind]) for part in parts]
            found.values[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        for field in type_.fields.values():
            if field.required and not found.has(field.name):
                self._fail(begin, f"{type_.name} lacks its field {field.name!r}")
        return found

    def _value(
        self,
        into: Message,
        field: Field,
        wire: int,
        at: int,
        end: int,
        depth: int,
        pieces: dict[str, list[Any]],
    ) -> int:
        values = into.values
        if wire == VARINT:
            raw, after = self._varint(at, end)
            value = _whole(field, raw)
            if value is not None:
                self._keep(values, field, value, at)
            return after
        start, after = self._stretch(wire, at, end, f"field {field.name!r} of {into.schema.name}")
        if field.kind in REAL:
            self._reals(values, field, wire, start, after, pieces)
        elif field.kind == "message":
            if depth >= MOST_NESTED:
                self._fail(at, f"more than {MOST_NESTED} messages within each other")
            value = self._message(field.message, start, after, depth + 1)
            if field.repeated or field.name not in values:
                self._keep(values, field, value, at)
            else:
                _merge(values[field.name], value)
        elif field.kind == "string":
            self._keep(
                values, field, self._data[start:after].decode("utf-8", "surrogateescape"), at
            )
        elif field.kind == "bytes":
            self._keep(values, field, self._data[start:after], at)
        else:
            while start < after:
                raw, start = self._varint(start, after)
                value = _whole(field, raw)
                if value is not None:
                    self._keep(values, field, value, at)
        return after

    def _reals(
        self,
        values: dict[str, Any],
        field: Field,
        wire: int,
        start: int,
        stop: int,
        pieces: dict[str, list[Any]],
    ) -> None:
        dtype = REAL[field.kind]
        if (stop - start) % dtype.itemsize:
            self._fail(
                start, f"{stop - start} bytes are no whole number of {field.kind}s: it is damaged"
            )
        count = (stop - start) // dtype.itemsize
        if not field.repeated:
            values[field.name] = float(np.frombuffer(self._data, dtype, count, start)[0])
        elif wire == LENGTH:
            if count:
                pieces.setdefault(field.name, []).append(
                    np.frombuffer(self._data, dtype, count, start)
                )
        else:
            # One by one, as old files have them: they gather in one buffer, not in an array each.
            parts = pieces.setdefault(field.name, [])
            if not parts or not isinstance(parts[-1], bytearray):
                parts.append(bytearray())
            parts[-1] += self._data[start:stop]

    def _skip(self, number: int, wire: int, at: int, end: int, depth: int) -> int:
        if wire == VARINT:
            return self._varint(at, end)[1]
        if wire != OPEN:
            return self._stretch(wire, at, end, f"unknown field {number}")[1]
        open_ = [number]
        begin = at
        while open_:
            if at >= end:
                self._fail(begin, "the data ends within a group: the file is cut off or damaged")
            if depth + len(open_) > MOST_NESTED:
                self._fail(begin, f"more than {MOST_NESTED} messages within each other")
            inner, wire, after = self._tag(at, end)
            if wire == OPEN:
                open_.append(inner)
                at = after
            elif wire == CLOSE:
                if inner != open_.pop():
                    self._fail(at, "a group ends that did not start: the file is damaged")
                at = after
            else:
                at = self._skip(inner, wire, after, end, depth)
        return at


def _fits(field: Field, wire: int) -> bool:
    """Whether a field may come in this way; repeated numbers do in two."""
    own = type_of(field.kind)
    return wire == own or (wire == LENGTH and field.repeated and own != LENGTH)


def _merge(into: Message, other: Message) -> None:
    """Protobuf's rule for a message that comes in several pieces."""
    for name, value in other.values.items():
        field = into.schema.fields[name]
        if name not in into.values:
            into.values[name] = value
        elif field.repeated:
            into.values[name] = [*into.values[name], *value]
        elif field.kind == "message":
            _merge(into.values[name], value)
        else:
            into.values[name] = value


def _whole(field: Field, raw: int) -> Any:
    if field.kind == "bool":
        return raw != 0
    if field.kind in ("uint32", "uint64"):
        return raw & 0xFFFFFFFF if field.kind == "uint32" else raw
    bits = 64 if field.kind == "int64" else 32
    value = raw & ((1 << bits) - 1)
    value = value - (1 << bits) if value >> (bits - 1) else value
    # A name that this version does not know is as if it were absent, as in protobuf.
    return field.enum.names.get(value) if field.kind == "enum" else value
