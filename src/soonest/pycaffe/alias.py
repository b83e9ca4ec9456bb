"""Lets ``import caffe``, and what is in it, find this package."""

from __future__ import annotations

import importlib
import sys

PACKAGE = "soonest.pycaffe"
_INNER = (
    "io", "net_spec", "classifier", "detector", "draw", "proto", "proto.caffe_pb2", "pycaffe",
)  # fmt: skip


def provide() -> None:
    """Makes ``caffe`` a name of this package, unless the real one is there already."""
    if "caffe" in sys.modules:
        return
    sys.modules["caffe"] = importlib.import_module(PACKAGE)
    for name in _INNER:
        place = {"pycaffe": "net"}.get(name, name)
        sys.modules[f"caffe.{name}"] = importlib.import_module(f"{PACKAGE}.{place}")
