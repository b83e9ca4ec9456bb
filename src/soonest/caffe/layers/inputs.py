"""Layers that read nothing: what is fed from outside, and what fillers make up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soonest.caffe.fillers import check, filled
from soonest.caffe.layers.base import MANY, Layer, Shape, check_shape, filler
from soonest.caffe.message import Message


class Input(Layer):
    """What is fed to the net; until then, zeros."""

    bottoms = (0, 0)
    tops = (1, MANY)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        given = [tuple(shape.dim) for shape in spec.input_param.shape]
        if len(given) not in (1, len(spec.top)):
            raise ValueError(f"it has {len(given)} shapes: give one, or one for each top")
        self.shapes = given if len(given) > 1 else given * len(spec.top)
        for shape in self.shapes:
            check_shape(shape, "top")

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape) for shape in self.shapes)


class DummyData(Layer):
    """What fillers make up, anew each time."""

    bottoms = (0, 0)
    tops = (1, MANY)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.dummy_data_param
        tops = len(spec.top)
        self.shapes = _dummy_shapes(own, tops)
        self.fillers = list(own.data_filler) or [filler(0)]
        if len(self.fillers) not in (1, tops):
            raise ValueError(f"it has {len(self.fillers)} fillers: give none, one or {tops}")
        if len(self.fillers) == 1:
            self.fillers *= tops
        for shape, one in zip(self.shapes, self.fillers, strict=True):
            check_shape(shape, "top")
            check(shape, one)
        self._generator = torch.default_generator

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(
            filled(shape, one, self._generator)
            for shape, one in zip(self.shapes, self.fillers, strict=True)
        )

    def infer(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, device="meta") for shape in self.shapes)


def _dummy_shapes(own: Message, tops: int) -> list[Shape]:
    old = [list(getattr(own, name)) for name in ("num", "channels", "height", "width")]
    given: list[Shape] = [tuple(shape.dim) for shape in own.shape]
    if any(old):
        if given or any(len(sizes) not in (1, tops) for sizes in old):
            raise ValueError("give shape, or each of num, channels, height and width")
        wide = [sizes if len(sizes) > 1 else sizes * tops for sizes in old]
        given = [tuple(sizes) for sizes in zip(*wide, strict=True)]
    if len(given) not in (1, tops):
        raise ValueError(f"it has {len(given)} shapes: give one, or one for each top")
    return given if len(given) > 1 else given * tops
