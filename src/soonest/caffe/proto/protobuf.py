"""Caffe's messages as classes of protobuf's runtime, which reads and writes their two formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from soonest.caffe.proto.message import REAL, Message
from soonest.caffe.proto.schema import ENUMS, MESSAGES, Enum, Field


class MissingPackageError(ImportError, ValueError):
    """What Caffe's files need is not installed."""


try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
    from google.protobuf.message import DecodeError
except ImportError:
    raise MissingPackageError("Caffe's files need protobuf: pip install 'soonest[caffe]'") from None

PACKAGE = "caffe"

_Described = descriptor_pb2.FieldDescriptorProto


def described(text: str) -> descriptor_pb2.FileDescriptorProto:
    """What our table says of Caffe's messages, as protobuf describes a file.

    Args:
        text: what text is described as, ``string`` or ``bytes``.
    """
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package=PACKAGE)
    outer = {name: file.message_type.add(name=name) for name in MESSAGES}
    for enum in ENUMS.values():
        place, _, name = enum.name.rpartition(".")
        _add_enum((outer[place] if place else file).enum_type.add(name=name), enum)
    for message in MESSAGES.values():
        for field in message.fields.values():
            _add_field(
                outer[message.name].field.add(name=field.name, number=field.number), field, text
            )
    return file


def _add_enum(into: descriptor_pb2.EnumDescriptorProto, enum: Enum) -> None:
    for name, number in enum.values.items():
        into.value.add(name=name, number=number)


def _add_field(into: descriptor_pb2.FieldDescriptorProto, field: Field, text: str) -> None:
    label = "REPEATED" if field.repeated else "REQUIRED" if field.required else "OPTIONAL"
    into.label = _Described.Label.Value(f"LABEL_{label}")
    kind = text if field.kind == "string" else field.kind
    into.type = _Described.Type.Value(f"TYPE_{kind.upper()}")
    if field.kind in ("message", "enum"):
        into.type_name = f".{PACKAGE}.{field.type_name}"
    if field.packed:
        into.options.packed = True


def classes(text: str) -> dict[str, Any]:
    """Classes of all messages, by name; see ``described``."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(described(text).SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in MESSAGES
    }


CLASSES: dict[str, Any] = classes(text="bytes")
"""Per name of a message, its class. Text is bytes, which look the same in both formats: protobuf
refuses text that is no UTF-8, which Caffe's own files have in names and paths."""


def from_protobuf(found: Any) -> Message:
    """A message as we have it, from one of protobuf's."""
    message = Message(found.DESCRIPTOR.name)
    for descriptor, value in found.ListFields():
        field = message.schema.fields[descriptor.name]
        if field.packed and field.kind in REAL:
            message.values[field.name] = np.array(value, REAL[field.kind])
            continue
        take = _taking(field)
        message.values[field.name] = [take(one) for one in value] if field.repeated else take(value)
    return message


def to_protobuf(message: Message) -> Any:
    """A message as protobuf has it."""
    found = CLASSES[message.schema.name]()
    for name, value in message.values.items():
        field = message.schema.fields[name]
        place = getattr(found, name)
        if field.kind == "message":
            for one in value if field.repeated else [value]:
                inner = place.add() if field.repeated else place
                inner.SetInParent()
                inner.CopyFrom(to_protobuf(one))
            continue
        give = _giving(field)
        if field.repeated:
            place.extend(give(one) for one in value)
        else:
            setattr(found, name, give(value))
    return found


def _taking(field: Field) -> Callable[[Any], Any]:
    if field.kind == "message":
        return from_protobuf
    if field.kind == "string":
        return lambda value: value.decode("utf-8", "surrogateescape")
    return field.enum.names.__getitem__ if field.kind == "enum" else lambda value: value


def _giving(field: Field) -> Callable[[Any], Any]:
    if field.kind == "string":
        return lambda value: value.encode("utf-8", "surrogateescape")
    return field.enum.values.__getitem__ if field.kind == "enum" else lambda value: value


__all__ = [
    "CLASSES", "DecodeError", "MissingPackageError", "classes", "from_protobuf", "text_format",
    "to_protobuf",
]  # fmt: skip
