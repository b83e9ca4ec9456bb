"""Writes messages as text: the format of ``.prototxt`` files."""

from __future__ import annotations

from typing import Any

from soonest.caffe.message import Message, to_float32
from soonest.caffe.schema import Field


def write(message: Message) -> str:
    """A message as text, as Caffe's tools print it: fields by number, one a line."""
    lines: list[str] = []
    _write(message, "", lines)
    return "".join(lines)


def _write(message: Message, indent: str, lines: list[str]) -> None:
    for field in message.schema.by_number.values():
        if not message.has(field.name):
            continue
        value = message.values[field.name]
        for one in value if field.repeated else [value]:
            if field.kind == "message":
                lines.append(f"{indent}{field.name} {{\n")
                _write(one, indent + "  ", lines)
                lines.append(f"{indent}}}\n")
            else:
                lines.append(f"{indent}{field.name}: {_scalar(field, one)}\n")


def _scalar(field: Field, value: Any) -> str:
    if field.kind in ("string", "bytes"):
        raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        return '"' + "".join(_quoted(byte) for byte in raw) + '"'
    if field.kind == "bool":
        return "true" if value else "false"
    if field.kind == "float":
        short = f"{value:.6g}"
        return short if to_float32(float(short)) == to_float32(value) else f"{value:.9g}"
    if field.kind == "double":
        short = f"{value:.15g}"
        return short if float(short) == value else f"{value:.17g}"
    return str(value)


def _quoted(byte: int) -> str:
    if byte in b"\"'\\":
        return "\\" + chr(byte)
    if byte in b"\n\r\t":
        return {10: "\\n", 13: "\\r", 9: "\\t"}[byte]
    return chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}"
