"""Scale and Bias: multiply and add along some axes, by what is learned or by a second bottom."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from soonest.caffe.layers.base import Layer, Shape, axis_of, filler
from soonest.caffe.proto.message import Message


def _stretch(spec: Message, first: Shape) -> tuple[int, Shape]:
    """At which axis of the bottom the blob of a layer starts, and its shape."""
    axis = axis_of(spec.axis, len(first))
    if spec.num_axes == -1:
        return axis, first[axis:]
    shape = first[axis : axis + spec.num_axes]
    if len(shape) != spec.num_axes:
        raise ValueError(f"num_axes {spec.num_axes} from axis {axis} are more than there are")
    return axis, shape


def _spread(operand: Tensor, axis: int, like: Tensor) -> Tensor:
    """The operand with ones behind its axes, so that it meets those of another tensor from one on.

    Raises:
        ValueError: it does not fit.
    """
    axis = axis_of(axis, like.dim()) if operand.dim() else 0
    if like.shape[axis : axis + operand.dim()] != operand.shape:
        raise ValueError(
            f"a bottom of the shape {list(like.shape)} does not fit {list(operand.shape)} at axis "
            f"{axis}"
        )
    return operand.reshape((*operand.shape, *(1,) * (like.dim() - axis - operand.dim())))


class Bias(Layer):
    bottoms = (1, 2)
    bias: Tensor

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self.axis = spec.bias_param.axis
        if len(shapes) == 1:
            self.axis, shape = _stretch(spec.bias_param, shapes[0])
            self.add_blob("bias", shape, spec.bias_param.filler)

    def forward(self, bottom: Tensor, other: Tensor | None = None) -> Tensor:
        operand = self.bias if other is None else other
        return bottom + _spread(operand, self.axis, bottom)


class Scale(Layer):
    bottoms = (1, 2)
    weight: Tensor
    bias: Tensor | None

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.scale_param
        self.axis, shape = own.axis, shapes[-1]
        if len(shapes) == 1:
            self.axis, shape = _stretch(own, shapes[0])
            self.add_blob("weight", shape, own.filler if own.has("filler") else filler(1))
        if own.bias_term:
            self.add_blob("bias", shape, own.bias_filler)
        else:
            self.register_parameter("bias", None)

    def forward(self, bottom: Tensor, other: Tensor | None = None) -> Tensor:
        operand = self.weight if other is None else other
        top = bottom * _spread(operand, self.axis, bottom)
        return top if self.bias is None else top + _spread(self.bias, self.axis, bottom)
