"""Writes messages as text: the format of ``.prototxt`` files."""

from __future__ import annotations

import re

from soonest.caffe.proto.message import Message, to_float32
from soonest.caffe.proto.protobuf import text_format, to_protobuf
from soonest.caffe.proto.schema import MESSAGES

_FRACTION = re.compile(r"^( *(\w+): )(-?[0-9.]+(?:e[+-]?[0-9]+)?)$", re.MULTILINE)
_FLOATS = {
    field.name
    for message in MESSAGES.values()
    for field in message.fields.values()
    if field.kind == "float"
}


def write(message: Message) -> str:
    """A message as text, as Caffe's tools print it: fields by number, one a line."""
    return _FRACTION.sub(_as_in_c, text_format.MessageToString(to_protobuf(message)))


def _as_in_c(match: re.Match[str]) -> str:
    """A float as C++ prints it: six digits if they bring it back, else nine."""
    start, name, text = match.groups()
    if name not in _FLOATS or not set(".e") & set(text):
        return match[0]
    value = to_float32(float(text))
    short = f"{value:.6g}"
    return start + (short if to_float32(float(short)) == value else f"{value:.9g}")
