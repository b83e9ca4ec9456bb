"""Pooling, with Caffe's rules for how many windows there are and what an average is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from soonest.caffe.layers.base import Layer, Shape
from soonest.caffe.proto.message import Message

Pair = tuple[int, int]


def _size(own: Message, both: str, height: str, width: str) -> Pair:
    if own.has(height) != own.has(width) or (own.has(both) and own.has(height)):
        raise ValueError(f"give {both}, or both {height} and {width}")
    if own.has(height):
        return getattr(own, height), getattr(own, width)
    return getattr(own, both), getattr(own, both)


def windows(size: int, kernel: int, stride: int, pad: int, *, ceil: bool) -> int:
    """How many windows there are along an axis.

    Caffe counts a last one that is not full; that may be the only one. With padding it leaves out
    one that would start in the padding behind.

    Raises:
        ValueError: there is none, or a window would lie outside of the data.
    """
    span = size + 2 * pad - kernel
    number = (-(-span // stride) if ceil else span // stride) + 1
    if number < 1:
        raise ValueError(
            f"its kernel of {kernel} is larger than its bottom of {size} with {pad} of padding on "
            "each side"
        )
    if pad and (number - 1) * stride >= size + pad:
        number -= 1
    if (number - 1) * stride >= size + pad:
        raise ValueError(
            f"with a stride of {stride}, above its kernel of {kernel}, its last window would lie "
            f"outside of the {size} values: use round_mode: FLOOR or a smaller stride"
        )
    return number


@dataclass(frozen=True)
class Windows:
    """How windows lie on the last two axes: of each the size, the step, and the edge around."""

    kernel: Pair
    stride: Pair
    pad: Pair
    ceil: bool = True

    def on(self, size: Pair) -> Grid:
        """The windows on data of a height and width."""
        number = [
            windows(size[axis], self.kernel[axis], self.stride[axis], self.pad[axis],
                    ceil=self.ceil)
            for axis in (0, 1)
        ]  # fmt: skip
        return Grid(self, size, (number[0], number[1]))


@dataclass(frozen=True)
class Grid:
    """Windows on data of one size.

    Attributes:
        windows: of which kind.
        size: of the data.
        number: how many there are along each axis.
    """

    windows: Windows
    size: Pair
    number: Pair

    def maxima(self, bottom: Tensor) -> Tensor:
        """The largest value in each window."""
        padded = self._padded(bottom, float("-inf"))
        return functional.max_pool2d(padded, self.windows.kernel, self.windows.stride)

    def maxima_with_places(self, bottom: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and where each is, counted without padding."""
        own = self.windows
        padded = self._padded(bottom, float("-inf"))
        top, where = functional.max_pool2d(padded, own.kernel, own.stride, return_indices=True)
        row = where // padded.shape[3] - own.pad[0]
        column = where % padded.shape[3] - own.pad[1]
        return top, (row * self.size[1] + column).to(top.dtype)

    def means(self, bottom: Tensor) -> Tensor:
        """The sum of each window over its size, which counts padding as far as it was asked for."""
        down, right = (self._divisor(axis, bottom.device) for axis in (0, 1))
        return self.sums(bottom) / (down[:, None] * right)

    def sums(self, bottom: Tensor) -> Tensor:
        own, padded = self.windows, self._padded(bottom, 0.0)
        return functional.avg_pool2d(padded, own.kernel, own.stride, divisor_override=1)

    def weighted(self, bottom: Tensor) -> Tensor:
        """The mean of each window's values, each weighted with itself; 0 if they sum to nothing."""
        total = self.sums(bottom)
        some = total > 0
        return torch.where(some, self.sums(bottom * bottom) / torch.where(some, total, 1.0), 0.0)

    def drawn(self, bottom: Tensor) -> Tensor:
        """A value of each window, drawn as likely as it is large."""
        own = self.windows
        values = self._padded(bottom, 0.0)
        for axis in (0, 1):
            values = values.unfold(2 + axis, own.kernel[axis], own.stride[axis])
        values = values.flatten(-2)
        sums = values.detach().cumsum(-1)
        aim = sums[..., -1:] * torch.rand_like(sums[..., -1:])
        chosen = (sums >= aim).to(torch.uint8).argmax(-1, keepdim=True)
        return values.gather(-1, chosen).squeeze(-1)

    def _padded(self, bottom: Tensor, value: float) -> Tensor:
        (above, left), (below, right) = self.windows.pad, (self._behind(0), self._behind(1))
        edges = (left, right, above, below)
        return functional.pad(bottom, edges, value=value) if any(edges) else bottom

    def _behind(self, axis: int) -> int:
        """How far windows reach beyond the end of the data; below zero, how far they do not."""
        own = self.windows
        reach = (self.number[axis] - 1) * own.stride[axis] + own.kernel[axis]
        return reach - self.size[axis] - own.pad[axis]

    def _divisor(self, axis: int, device: torch.device) -> Tensor:
        own = self.windows
        start = torch.arange(self.number[axis], device=device) * own.stride[axis] - own.pad[axis]
        stop = (start + own.kernel[axis]).clamp(max=self.size[axis] + own.pad[axis])
        return (stop - start).to(torch.float32)


def pooled(grid: Grid, method: str, bottom: Tensor, *, random: bool) -> Tensor:
    """One value for each window.

    Args:
        grid: of windows.
        method: ``MAX``, ``AVE`` or ``STOCHASTIC``.
        bottom: of four axes.
        random: whether ``STOCHASTIC`` draws, or takes the mean that it would have.
    """
    if method == "MAX":
        return grid.maxima(bottom)
    if method == "AVE":
        return grid.means(bottom)
    return grid.drawn(bottom) if random else grid.weighted(bottom)


def _image_size(bottom: Tensor) -> Pair:
    if bottom.dim() != 4:
        raise ValueError(f"its bottom must have 4 axes, not the shape {list(bottom.shape)}")
    return bottom.shape[2], bottom.shape[3]


class Pooling(Layer):
    tops = (1, 2)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.pooling_param
        self.method = own.pool
        if self.method != "MAX" and len(spec.top) > 1:
            raise ValueError("only MAX pooling has a second top")
        self.everywhere = own.global_pooling
        kernel = (1, 1)
        if not self.everywhere:
            kernel = _size(own, "kernel_size", "kernel_h", "kernel_w")
        elif own.has("kernel_size") or own.has("kernel_h") or own.has("kernel_w"):
            raise ValueError("with global_pooling the kernel is its whole bottom: leave it out")
        pad = _size(own, "pad", "pad_h", "pad_w")
        stride = _size(own, "stride", "stride_h", "stride_w")
        if min(*kernel, *stride) < 1:
            raise ValueError("give a kernel_size and a stride above 0")
        if self.everywhere and (pad != (0, 0) or stride != (1, 1)):
            raise ValueError("with global_pooling, pad must be 0 and stride 1")
        if pad[0] >= kernel[0] or pad[1] >= kernel[1]:
            raise ValueError(f"its padding {pad} must be below its kernel {kernel}")
        if self.method == "STOCHASTIC" and any(pad):
            raise ValueError("stochastic pooling has no padding: leave pad out")
        self.windows = Windows(kernel, stride, pad, own.round_mode == "CEIL")

    def forward(self, bottom: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        size = _image_size(bottom)
        kind = Windows(size, (1, 1), (0, 0)) if self.everywhere else self.windows
        grid = kind.on(size)
        if len(self.spec.top) > 1:
            return grid.maxima_with_places(bottom)
        return pooled(grid, self.method, bottom, random=self.phase == "TRAIN")


class SPP(Layer):
    """A pyramid: pooled to 1 x 1, to 2 x 2, to 4 x 4, …, one after the other for each image."""

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self.height = spec.spp_param.pyramid_height
        if not 1 <= self.height <= 16:
            raise ValueError(f"its pyramid_height is {self.height}: give 1 to 16")

    def forward(self, bottom: Tensor) -> Tensor:
        size = _image_size(bottom)
        levels = [self._level(bottom, size, 2**level) for level in range(self.height)]
        if len(levels) == 1:
            return levels[0]
        return torch.cat([level.flatten(1) for level in levels], 1)

    def _level(self, bottom: Tensor, size: Pair, bins: int) -> Tensor:
        height, width = ((-(-one // bins), _half_up(-one % bins)) for one in size)
        kernel, pad = (height[0], width[0]), (height[1], width[1])
        if pad[0] >= kernel[0] or pad[1] >= kernel[1]:
            raise ValueError(
                f"its bottom of {size[0]} x {size[1]} is too small for {bins} x {bins} bins: lower "
                "pyramid_height"
            )
        grid = Windows(kernel, kernel, pad).on(size)
        return pooled(grid, self.spec.spp_param.pool, bottom, random=self.phase == "TRAIN")


def _half_up(number: int) -> int:
    return (number + 1) // 2
