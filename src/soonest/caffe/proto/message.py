"""A message as a value: fields as attributes, defaults for what is absent, where it stands."""

from __future__ import annotations

from typing import Any

import numpy as np

from soonest.caffe.proto.schema import INTEGER_RANGE, MESSAGES, Field, MessageType

REAL = {"float": np.dtype("<f4"), "double": np.dtype("<f8")}
"""Kinds of which a repeated field may also be an array, as large ones are."""


class Message:
    """One of Caffe's messages.

    Fields are attributes. An absent one reads as its default; an absent message reads as an empty
    one, which is not kept. A repeated field is a list, which may be changed in place; of numbers
    with a fraction it may also be a flat array. Enums are their names.

    Args:
        type_: its type, or the name of that.
        values: fields to start with.

    Raises:
        ValueError: there is no such type or field.

    Example:
        >>> Message("NetParameter", name="lenet").force_backward
        False
    """

    __slots__ = ("line", "schema", "values")

    schema: MessageType
    values: dict[str, Any]
    line: int | None
    """In which line of a text file it starts, counted from 1; None if it is from none."""

    def __init__(self, type_: MessageType | str, /, **values: Any) -> None:
        if isinstance(type_, str):
            if type_ not in MESSAGES:
                raise ValueError(f"Caffe has no message {type_!r}")
            type_ = MESSAGES[type_]
        object.__setattr__(self, "schema", type_)
        object.__setattr__(self, "values", {})
        object.__setattr__(self, "line", None)
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        field = self._field(name)
        if name in self.values:
            return self.values[name]
        if field.repeated:
            return self.values.setdefault(name, [])
        return Message(field.message) if field.kind == "message" else field.default

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "line":
            object.__setattr__(self, name, value)
            return
        field = self._field(name)
        if isinstance(value, np.ndarray) and field.kind in REAL:
            value = np.ascontiguousarray(value, REAL[field.kind]).reshape(-1)
        elif field.repeated:
            value = [checked(field, one) for one in value]
        else:
            value = checked(field, value)
        self.values[name] = value

    def __delattr__(self, name: str) -> None:
        self._field(name)
        self.values.pop(name, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return self.schema is other.schema and self._present() == other._present()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self.schema.name} {', '.join(self._present())}>"

    def has(self, name: str) -> bool:
        """Whether a field is there; a repeated one, whether it has an element."""
        field = self._field(name)
        return name in self.values and (not field.repeated or len(self.values[name]) > 0)

    def put(self, name: str) -> Message:
        """The message in a field, put there empty if it was absent."""
        return self.values.setdefault(name, Message(self._field(name).message))

    def add(self, name: str, /, **values: Any) -> Message:
        """Appends an empty message, or one of these values, to a repeated field and returns it."""
        new = Message(self._field(name).message, **values)
        getattr(self, name).append(new)
        return new

    def _present(self) -> dict[str, Any]:
        return {
            name: [float(one) for one in value] if isinstance(value, np.ndarray) else value
            for name, value in self.values.items()
            if self.has(name)
        }

    def _field(self, name: str) -> Field:
        try:
            return self.schema.fields[name]
        except KeyError:
            raise ValueError(f"{self.schema.name} has no field {name!r}") from None


def checked(field: Field, value: Any) -> Any:
    """A value as a field keeps it: float32 rounded as it will be, enums by name.

    Raises:
        ValueError: the field cannot hold it.
    """
    if field.kind == "message":
        if isinstance(value, Message) and value.schema is field.message:
            return value
    elif field.kind == "enum":
        if value in field.enum.values:
            return value
    elif field.kind in INTEGER_RANGE:
        low, high = INTEGER_RANGE[field.kind]
        if isinstance(value, (int, np.integer)) and low <= value <= high:
            return int(value)
    elif field.kind == "float":
        return float(to_float32(value))
    elif field.kind == "double":
        return float(value)
    elif field.kind == "bool":
        return bool(value)
    elif isinstance(value, str if field.kind == "string" else bytes):
        return value
    raise ValueError(f"field {field.name!r} takes {field.type_name}, not {value!r}")


def to_float32(value: float) -> np.float32:
    """The nearest float32; beyond the largest, infinity, as in C."""
    with np.errstate(over="ignore"):
        return np.float32(value)
