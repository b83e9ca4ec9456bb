"""Random messages of Caffe's, for property tests."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import strategies as st

from soonest.caffe.proto.message import Message
from soonest.caffe.proto.schema import INTEGER_RANGE, MESSAGES, Field

_SIMPLE: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "float": st.floats(width=32, allow_nan=False),
    "double": st.floats(allow_nan=False),
    "string": st.text(max_size=8),
    "bytes": st.binary(max_size=8),
    **{kind: st.integers(low, high) for kind, (low, high) in INTEGER_RANGE.items()},
}


@cache
def _values(field: Field, depth: int) -> st.SearchStrategy[Any]:
    if field.kind == "message":
        one = messages(field.type_name, depth - 1)
    elif field.kind == "enum":
        one = st.sampled_from(sorted(field.enum.values))
    else:
        one = _SIMPLE[field.kind]
    return st.lists(one, min_size=1, max_size=2) if field.repeated else one


@cache
def messages(type_name: str, depth: int = 3) -> st.SearchStrategy[Message]:
    """A message with up to three fields, and those it must have."""
    return _messages(type_name, depth)


@st.composite
def _messages(draw: st.DrawFn, type_name: str, depth: int) -> Message:
    fields = [
        field for field in MESSAGES[type_name].fields.values() if depth or field.kind != "message"
    ]
    chosen = draw(st.lists(st.sampled_from(fields), max_size=3, unique=True)) if fields else []
    chosen += [field for field in fields if field.required and field not in chosen]
    return Message(type_name, **{field.name: draw(_values(field, depth)) for field in chosen})
