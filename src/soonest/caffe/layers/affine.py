"""Scale and Bias: multiply and add along some axes, by what is learned or by a second bottom."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from soonest.caffe.layers.base import Layer, Shape, axis_of, filler
from soonest.caffe.message import Message


def _stretch(spec: Message, shapes: Sequence[Shape]) -> tuple[int, Shape]:
    """Which axis of the first bottom the other operand starts at, and its shape."""
    first = shapes[0]
    axis = axis_of(spec.axis, len(first))
    if len(shapes) > 1:
        axis = 0 if not shapes[1] else axis
        shape = shapes[1]
    elif spec.num_axes == -1:
        shape = first[axis:]
    else:
        shape = first[axis : axis + spec.num_axes]
        if len(shape) != spec.num_axes:
            raise ValueError(f"num_axes {spec.num_axes} from axis {axis} are more than there are")
    if first[axis : axis + len(shape)] != shape:
        raise ValueError(
            f"its second bottom has the shape {list(shape)}, which does not fit {list(first)} at "
            f"axis {axis}"
        )
    return axis, shape


def _spread(operand: Tensor, axis: int, like: Tensor) -> Tensor:
    """The operand with ones behind its axes, so that it meets those of another tensor."""
    return operand.reshape(*operand.shape, *(1,) * (like.dim() - axis - operand.dim()))


class Bias(Layer):
    bottoms = (1, 2)
    bias: Tensor

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self.axis, shape = _stretch(spec.bias_param, shapes)
        if len(shapes) == 1:
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
        self.axis, shape = _stretch(own, shapes)
        if len(shapes) == 1:
            self.add_blob("weight", shape, own.filler if own.has("filler") else filler(1))
        if own.bias_term:
            self.add_blob("bias", shape, own.bias_filler)
        else:
            self.register_parameter("bias", None)

    def forward(self, bottom: Tensor, other: Tensor | None = None) -> Tensor:
        operand = self.weight if other is None else other
        top = bottom * _spread(operand, self.axis, bottom)
        return top if self.bias is None else top + _spread(self.bias, self.axis, bottom)
