"""Pooling, with Caffe's rules for how many windows there are and what an average is divided by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from soonest.caffe.layers.base import Layer, Shape
from soonest.caffe.message import Message


def _size(own: Message, both: str, height: str, width: str) -> tuple[int, int]:
    if own.has(height) != own.has(width) or (own.has(both) and own.has(height)):
        raise ValueError(f"give {both}, or both {height} and {width}")
    if own.has(height):
        return getattr(own, height), getattr(own, width)
    return getattr(own, both), getattr(own, both)


def windows(size: int, kernel: int, stride: int, pad: int, *, ceil: bool) -> int:
    """How many windows there are along an axis.

    Caffe counts a last one that is not full. With padding it leaves out one that would start in the
    padding behind.

    Raises:
        ValueError: a window would lie outside of the data.
    """
    span = size + 2 * pad - kernel
    if span < 0:
        raise ValueError(
            f"its kernel of {kernel} is larger than its bottom of {size} with {pad} of padding on "
            "each side"
        )
    number = (span + stride - 1 if ceil else span) // stride + 1
    if pad and (number - 1) * stride >= size + pad:
        number -= 1
    if (number - 1) * stride >= size + pad:
        raise ValueError(
            f"with a stride of {stride}, above its kernel of {kernel}, its last window would lie "
            f"outside of the {size} values: use round_mode: FLOOR or a smaller stride"
        )
    return number


class Pooling(Layer):
    tops = (1, 2)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.pooling_param
        shape = shapes[0]
        if len(shape) != 4:
            raise ValueError(f"its bottom must have 4 axes, not the shape {list(shape)}")
        self.method = own.pool
        if self.method == "STOCHASTIC":
            raise ValueError("stochastic pooling is not supported: use MAX or AVE")
        if self.method == "AVE" and len(spec.top) > 1:
            raise ValueError("only MAX pooling has a second top")
        if own.global_pooling:
            if own.has("kernel_size") or own.has("kernel_h") or own.has("kernel_w"):
                raise ValueError("with global_pooling the kernel is its whole bottom: leave it out")
            self.kernel = (shape[2], shape[3])
        else:
            self.kernel = _size(own, "kernel_size", "kernel_h", "kernel_w")
        self.pad = _size(own, "pad", "pad_h", "pad_w")
        self.stride = _size(own, "stride", "stride_h", "stride_w")
        if min(*self.kernel, *self.stride) < 1:
            raise ValueError("give a kernel_size and a stride above 0")
        if own.global_pooling and (self.pad != (0, 0) or self.stride != (1, 1)):
            raise ValueError("with global_pooling, pad must be 0 and stride 1")
        if self.pad[0] >= self.kernel[0] or self.pad[1] >= self.kernel[1]:
            raise ValueError(f"its padding {self.pad} must be below its kernel {self.kernel}")
        ceil = own.round_mode == "CEIL"
        self.number = tuple(
            windows(
                shape[2 + axis], self.kernel[axis], self.stride[axis], self.pad[axis], ceil=ceil
            )
            for axis in (0, 1)
        )

    def _behind(self, axis: int, size: int) -> int:
        """How far windows reach beyond the end of the data; below zero, how far they do not."""
        return (
            (self.number[axis] - 1) * self.stride[axis] + self.kernel[axis] - size - self.pad[axis]
        )

    def forward(self, bottom: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        height, width = bottom.shape[2:]
        edges = (self.pad[1], self._behind(1, width), self.pad[0], self._behind(0, height))
        outside = float("-inf") if self.method == "MAX" else 0.0
        padded = functional.pad(bottom, edges, value=outside) if any(edges) else bottom
        if self.method == "AVE":
            # The divisor counts padding, but only as far as that was asked for.
            summed = functional.avg_pool2d(padded, self.kernel, self.stride, divisor_override=1)
            down = self._divisor(0, height, bottom.device)[:, None]
            return summed / (down * self._divisor(1, width, bottom.device))
        if len(self.spec.top) == 1:
            return functional.max_pool2d(padded, self.kernel, self.stride)
        top, where = functional.max_pool2d(padded, self.kernel, self.stride, return_indices=True)
        row = where // padded.shape[3] - self.pad[0]
        column = where % padded.shape[3] - self.pad[1]
        return top, (row * width + column).to(top.dtype)

    def _divisor(self, axis: int, size: int, device: torch.device) -> Tensor:
        start = torch.arange(self.number[axis], device=device) * self.stride[axis] - self.pad[axis]
        stop = (start + self.kernel[axis]).clamp(max=size + self.pad[axis])
        return (stop - start).to(torch.float32)
