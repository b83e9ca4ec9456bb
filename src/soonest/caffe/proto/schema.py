"""What Caffe's messages look like: text parser and wire codec both go by this description."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from soonest.caffe.proto.messages import TABLE

Kind = Literal[
    "int32", "int64", "uint32", "uint64", "bool", "float", "double", "string", "bytes", "enum",
    "message",
]  # fmt: skip

INTEGER_RANGE: dict[str, tuple[int, int]] = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}
"""Per kind of whole number, the lowest and the highest."""
_SCALARS = frozenset([*INTEGER_RANGE, "bool", "float", "double", "string", "bytes"])
_ZERO: dict[str, Any] = {"bool": False, "float": 0.0, "double": 0.0, "string": "", "bytes": b""}


@dataclass(frozen=True)
class Enum:
    """Named numbers."""

    name: str
    values: dict[str, int]
    names: dict[int, str]


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        name: as in text.
        number: as on the wire.
        kind: of its values.
        repeated: whether it is a list.
        packed: whether that list is written in one piece on the wire; read are both forms.
        required: whether a message without it is wrong.
        default: what an absent field reads as; for enums the name.
        type_name: of its enum or message.
    """

    name: str
    number: int
    kind: Kind
    repeated: bool = False
    packed: bool = False
    required: bool = False
    default: Any = None
    type_name: str = ""

    @property
    def enum(self) -> Enum:
        return ENUMS[self.type_name]

    @property
    def message(self) -> MessageType:
        return MESSAGES[self.type_name]


@dataclass(frozen=True)
class MessageType:
    """A message: its fields by name, and by number in rising order."""

    name: str
    fields: dict[str, Field] = field(repr=False)
    by_number: dict[int, Field] = field(repr=False)


def _default(kind: str, type_name: str, text: str | None, enums: dict[str, Enum]) -> Any:
    if kind == "enum":
        return next(iter(enums[type_name].values)) if text is None else text
    if text is None:
        return _ZERO.get(kind, 0)
    if kind == "bool":
        return text == "true"
    if kind in INTEGER_RANGE:
        return int(text)
    return float(text) if kind in ("float", "double") else text


def _field(text: str, enums: dict[str, Enum]) -> Field:
    number, name, type_text = text.split()
    type_text, has_default, default = type_text.partition("=")
    type_name = type_text.rstrip("*!")
    marks = type_text[len(type_name) :]
    kind: Any = type_name
    if type_name not in _SCALARS:
        kind = "enum" if type_name in enums else "message"
    return Field(
        name,
        int(number),
        kind,
        repeated="*" in marks,
        packed="**" in marks,
        required="!" in marks,
        default=None
        if "*" in marks or kind == "message"
        else _default(kind, type_name, default if has_default else None, enums),
        type_name=type_name,
    )


def read(table: str) -> tuple[dict[str, MessageType], dict[str, Enum]]:
    """The messages and enums of a table as in ``messages.py``, by name."""
    lines = table.replace("\n  ", " ").strip().splitlines()
    enums: dict[str, Enum] = {}
    for line in lines:
        head, _, body = line.partition(": ")
        if head.startswith("enum "):
            pairs = (item.split("=") for item in body.split())
            values = {name: int(number) for name, number in pairs}
            name = head.removeprefix("enum ")
            enums[name] = Enum(name, values, {number: key for key, number in values.items()})
    messages: dict[str, MessageType] = {}
    for line in lines:
        name, _, body = line.partition(": ")
        if not name.startswith("enum "):
            fields = sorted((_field(text, enums) for text in body.split(";")), key=_number)
            messages[name] = MessageType(
                name, {one.name: one for one in fields}, {one.number: one for one in fields}
            )
    return messages, enums


def _number(one: Field) -> int:
    return one.number


MESSAGES, ENUMS = read(TABLE)
