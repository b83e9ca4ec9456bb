"""Layers that read nothing: what is fed from outside, is made up, or is itself learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soonest.caffe.layers.base import MANY, Layer, Shape, check_shape, filler
from soonest.caffe.layers.fillers import check, filled
from soonest.caffe.proto.message import Message


class Fed(Layer):
    """Something whose tops a program may give to the net."""

    bottoms = (0, 0)
    tops = (1, MANY)
    shapes: list[Shape]

    def infer(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, device="meta") for shape in self.shapes)


class Input(Fed):
    """What is fed to the net; until then, zeros."""

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


class MemoryData(Fed):
    """Images and labels that a program has put there, a batch at a time, again and again."""

    tops = (2, 2)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.memory_data_param
        image = (own.channels, own.height, own.width)
        self.shapes = [(own.batch_size, *image), (own.batch_size, 1, 1, 1)]
        for shape in self.shapes:
            check_shape(shape, "top")
        self._items: tuple[Tensor, Tensor] | None = None
        self._next = 0

    def put(self, images: Tensor, labels: Tensor) -> None:
        """Gives it items, from the first of which it starts.

        Args:
            images: (items, channels, height, width); items are a multiple of the batch.
            labels: one for each.

        Raises:
            ValueError: they do not fit.
        """
        batch, *image = self.shapes[0]
        if list(images.shape[1:]) != image or len(images) % batch or not len(images):
            raise ValueError(
                f"images have the shape {list(images.shape)}: give a multiple of {batch}, each of "
                f"{image}"
            )
        if labels.numel() != len(images):
            raise ValueError(f"there are {labels.numel()} labels for {len(images)} images")
        self._items = images.float(), labels.float().reshape(-1, 1, 1, 1)
        self._next = 0

    def forward(self) -> tuple[Tensor, ...]:
        if self._items is None:
            raise ValueError(
                "its data come from a program, and none has put any there: feed its tops to the "
                "net, or read with Data, HDF5Data or ImageData"
            )
        first = self._next
        last = first + self.shapes[0][0]
        self._next = last % len(self._items[0])
        return tuple(values[first:last] for values in self._items)


class Parameter(Layer):
    """A blob that is learned, as a top."""

    bottoms = (0, 0)
    blob: Tensor

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self.add_blob("blob", tuple(spec.parameter_param.shape.dim), filler(0))

    def forward(self) -> Tensor:
        # In Caffe each backward pass writes its gradient anew: with iter_size the last one counts.
        if torch.is_grad_enabled() and self.blob.grad is not None:
            self.blob.grad.zero_()
        return self.blob.view_as(self.blob)


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
