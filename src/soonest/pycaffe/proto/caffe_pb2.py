"""Classes of Caffe's messages, and the numbers of its enums that stand by themselves."""

from __future__ import annotations

from typing import Any

from soonest.caffe.proto.protobuf import classes
from soonest.caffe.proto.schema import ENUMS

_CLASSES = classes(text="string")


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return _CLASSES[name]
    for enum in ENUMS.values():
        if "." not in enum.name and name in enum.values:
            return enum.values[name]
    raise AttributeError(f"Caffe has no message {name!r}")


def __dir__() -> list[str]:
    return [*_CLASSES, *ENUMS["Phase"].values]
