"""Convolution and its transpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from soonest.caffe.layers.base import MANY, Layer, Shape, axis_of
from soonest.caffe.message import Message

_BY_AXES: dict[bool, dict[int, Callable[..., Tensor]]] = {
    False: {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d},
    True: {
        1: functional.conv_transpose1d,
        2: functional.conv_transpose2d,
        3: functional.conv_transpose3d,
    },
}


def per_axis(
    spec: Message, names: tuple[str, str, str], axes: int, default: int | None
) -> tuple[int, ...]:
    """A size per spatial axis: given once, once per axis, or by height and width.

    Args:
        spec: where it stands.
        names: of the field for all axes, for the height, for the width; these two may be "".
        axes: how many.
        default: if it is absent; None if it must be there.

    Raises:
        ValueError: it is not given as it must be.
    """
    both, height, width = names
    given = list(getattr(spec, both))
    if height and (spec.has(height) or spec.has(width)):
        if axes != 2 or given:
            raise ValueError(f"{height} and {width} need 2 spatial axes, and no {both} beside them")
        given = [getattr(spec, height), getattr(spec, width)]
    if not given and default is not None:
        given = [default]
    if len(given) not in (1, axes):
        raise ValueError(
            f"{both} is given {len(given)} times: give it once, or once for each of the "
            f"{axes} spatial axes"
        )
    return tuple(given) * (axes if len(given) == 1 else 1)


class Convolution(Layer):
    """Weights: (num_output, channels / group, *kernel)."""

    bottoms = (1, MANY)
    tops = (1, MANY)
    paired = True
    transposed: ClassVar[bool] = False
    weight: Tensor
    bias: Tensor | None

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.convolution_param
        shape = shapes[0]
        axis = axis_of(own.axis, len(shape))
        self.axes = len(shape) - axis - 1
        self.outer = axis
        if self.axes not in _BY_AXES[False]:
            raise ValueError(f"it has {self.axes} spatial axes: 1 to 3 are supported")
        if any(other != shape for other in shapes):
            raise ValueError("all its bottoms must have the same shape")
        kernel = per_axis(own, ("kernel_size", "kernel_h", "kernel_w"), self.axes, None)
        self.stride = per_axis(own, ("stride", "stride_h", "stride_w"), self.axes, 1)
        self.padding = per_axis(own, ("pad", "pad_h", "pad_w"), self.axes, 0)
        self.dilation = per_axis(own, ("dilation", "", ""), self.axes, 1)
        self.group = own.group
        channels, outputs = shape[axis], own.num_output
        if min(*kernel, *self.stride, *self.dilation, outputs, self.group) < 1:
            raise ValueError("num_output, kernel, stride, dilation and group must be above 0")
        if channels % self.group or outputs % self.group:
            raise ValueError(
                f"group {self.group} must divide the {channels} channels of its bottom and "
                f"num_output {outputs}"
            )
        self._check_size(shape[axis + 1 :], kernel)
        first, second = (channels, outputs) if self.transposed else (outputs, channels)
        self.add_blob("weight", (first, second // self.group, *kernel), own.weight_filler)
        if own.bias_term:
            self.add_blob("bias", (outputs,), own.bias_filler)
        else:
            self.register_parameter("bias", None)

    def _check_size(self, size: Shape, kernel: Shape) -> None:
        for axis, (have, wide) in enumerate(zip(size, kernel, strict=True)):
            covered = self.dilation[axis] * (wide - 1) + 1
            if not self.transposed and have + 2 * self.padding[axis] < covered:
                raise ValueError(
                    f"its kernel covers {covered}, but its bottom has only {have} with "
                    f"{self.padding[axis]} of padding on each side"
                )

    def forward(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._one(bottom) for bottom in bottoms)

    def _one(self, bottom: Tensor) -> Tensor:
        keywords: dict[str, Any] = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.group,
        }
        outer = bottom.shape[: self.outer]
        bottom = bottom.reshape(-1, *bottom.shape[self.outer :])
        top = _BY_AXES[self.transposed][self.axes](bottom, self.weight, self.bias, **keywords)
        return top.reshape(*outer, *top.shape[1:])


class Deconvolution(Convolution):
    """The transpose of a convolution. Weights: (channels, num_output / group, *kernel)."""

    transposed = True
