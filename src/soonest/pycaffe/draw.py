"""pycaffe's ``draw``: a picture of a net."""

from __future__ import annotations

from typing import Any

from soonest.caffe.io import upgrade
from soonest.caffe.proto import wire
from soonest.caffe.tools import draw_net

_PHASES = ("TRAIN", "TEST")


def draw_net_to_file(
    caffe_net: Any, filename: str, rankdir: str = "LR", phase: int | None = None
) -> None:
    """Writes a picture.

    Args:
        caffe_net: a ``NetParameter`` of ``caffe_pb2``.
        filename: ``.svg`` and ``.dot`` always, others if graphviz is installed.
        rankdir: ``LR`` from left to right, ``TB`` from top to bottom.
        phase: whose layers are drawn, ``caffe.TRAIN`` or ``caffe.TEST``; by default all.
    """
    net = upgrade.net(wire.decode(caffe_net.SerializeToString(), "NetParameter"))
    draw_net.draw_definition(
        net, filename, rankdir=rankdir, phase="ALL" if phase is None else _PHASES[phase]
    )
