"""Convolution, its transpose, and what it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from soonest.caffe.layers.base import MANY, Layer, Shape, axis_of
from soonest.caffe.proto.message import Message

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
        default: if it is absent; None if it must be there, unless there are no axes.

    Raises:
        ValueError: it is not given as it must be.
    """
    both, height, width = names
    given = list(getattr(spec, both))
    if height and (spec.has(height) or spec.has(width)):
        if axes != 2 or given:
            raise ValueError(f"{height} and {width} need 2 spatial axes, and no {both} beside them")
        given = [getattr(spec, height), getattr(spec, width)]
    if not given and (default is not None or not axes):
        given = [1 if default is None else default]
    if len(given) not in (1, axes):
        raise ValueError(
            f"{both} is given {len(given)} times: give it once, or once for each of the "
            f"{axes} spatial axes"
        )
    return tuple(given) * (axes if len(given) == 1 else 1)


class _Windowed(Layer):
    """What has windows over the axes behind the one of channels."""

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.convolution_param
        self.outer = axis_of(own.axis, len(shapes[0]))
        self.axes = len(shapes[0]) - self.outer - 1
        self.kernel = per_axis(own, ("kernel_size", "kernel_h", "kernel_w"), self.axes, None)
        self.stride = per_axis(own, ("stride", "stride_h", "stride_w"), self.axes, 1)
        self.padding = per_axis(own, ("pad", "pad_h", "pad_w"), self.axes, 0)
        self.dilation = per_axis(own, ("dilation", "", ""), self.axes, 1)
        if min(*self.kernel, *self.stride, *self.dilation, 1, 1) < 1:
            raise ValueError("kernel, stride and dilation must be above 0")

    def _covered(self) -> list[int]:
        """How far the kernel reaches along each axis."""
        return [
            space * (wide - 1) + 1 for space, wide in zip(self.dilation, self.kernel, strict=True)
        ]

    def _missing(self, bottom: Tensor) -> list[int]:
        """How much of each axis the kernel needs beyond its end, to fit in once.

        Caffe divides a size below zero by the stride as C does, towards zero, so a kernel may be
        larger than its bottom by less than the stride.

        Raises:
            ValueError: it is too large.
        """
        found: list[int] = []
        for axis, covered in enumerate(self._covered()):
            have, pad = bottom.shape[self.outer + 1 + axis], self.padding[axis]
            found.append(max(0, covered - have - 2 * pad))
            if found[-1] >= self.stride[axis]:
                raise ValueError(
                    f"its kernel covers {covered}, but its bottom has only {have} with {pad} of "
                    "padding on each side"
                )
        return found


class Convolution(_Windowed):
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
        if self.axes > 3:
            raise ValueError(f"it has {self.axes} spatial axes: 0 to 3 are supported")
        self.group = own.group
        self.channels, outputs = shapes[0][self.outer], own.num_output
        if min(outputs, self.group) < 1:
            raise ValueError("num_output and group must be above 0")
        if self.channels % self.group or outputs % self.group:
            raise ValueError(
                f"group {self.group} must divide the {self.channels} channels of its bottom and "
                f"num_output {outputs}"
            )
        first, second = self.channels, outputs
        if not self.transposed:
            first, second = second, first
        self.add_blob("weight", (first, second // self.group, *self.kernel), own.weight_filler)
        if own.bias_term:
            self.add_blob("bias", (outputs,), own.bias_filler)
        else:
            self.register_parameter("bias", None)

    def forward(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        if any(other.shape != bottoms[0].shape for other in bottoms):
            raise ValueError("all its bottoms must have the same shape")
        return tuple(self._one(bottom) for bottom in bottoms)

    def _one(self, bottom: Tensor) -> Tensor:
        if bottom.dim() != self.outer + 1 + self.axes or bottom.shape[self.outer] != self.channels:
            raise ValueError(
                f"its bottom has the shape {list(bottom.shape)}, but its weights are for "
                f"{self.channels} channels on axis {self.outer} and {self.axes} axes behind it"
            )
        keywords: dict[str, Any] = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.group,
        }
        outer = bottom.shape[: self.outer]
        weight, axes = self.weight, self.axes
        missing = [0] * axes if self.transposed else self._missing(bottom)
        values = bottom.reshape(-1, *bottom.shape[self.outer :])
        if not axes:  # A matrix product: as if there were one axis of one place.
            values, weight, axes = values.unsqueeze(-1), weight.unsqueeze(-1), 1
            keywords.update(stride=1, padding=0, dilation=1)
        if any(missing):
            values = functional.pad(values, [edge for more in missing[::-1] for edge in (0, more)])
        top = _BY_AXES[self.transposed][axes](values, weight, self.bias, **keywords)
        return top.reshape(*outer, top.shape[1], *top.shape[2 : 2 + self.axes])


class Deconvolution(Convolution):
    """The transpose of a convolution. Weights: (channels, num_output / group, *kernel)."""

    transposed = True


class Im2col(_Windowed):
    """What a convolution multiplies: each window's values as channels, one place per window."""

    def forward(self, bottom: Tensor) -> Tensor:
        missing = self._missing(bottom)
        behind = [edge + more for edge, more in zip(self.padding, missing, strict=True)]
        edges = [*zip(self.padding, behind, strict=True)][::-1]
        values = functional.pad(bottom, [edge for pair in edges for edge in pair])
        for axis, covered in enumerate(self._covered()):
            values = values.unfold(self.outer + 1 + axis, covered, self.stride[axis])
            values = values[..., :: self.dilation[axis]]
        # Now the places within a window are behind: they go to the channels.
        first = self.outer + 1
        inside = tuple(range(first + self.axes, first + 2 * self.axes))
        values = values.movedim(inside, tuple(range(first, first + self.axes)))
        return values.flatten(self.outer, first + self.axes - 1)
