"""Layers that join, cut and reshape, and those that reduce."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from soonest.caffe.layers.base import MANY, Layer, Shape, axis_of, count
from soonest.caffe.proto.message import Message


class Concat(Layer):
    bottoms = (1, MANY)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.concat_param
        if own.has("concat_dim") and own.has("axis"):
            raise ValueError("it has both axis and concat_dim, its old form: use axis")
        self.axis = own.concat_dim if own.has("concat_dim") else own.axis

    def forward(self, *bottoms: Tensor) -> Tensor:
        first = bottoms[0].shape
        along = axis_of(self.axis, len(first))
        for bottom in bottoms:
            other = [*bottom.shape[:along], *first[along : along + 1], *bottom.shape[along + 1 :]]
            if other != list(first):
                raise ValueError(
                    f"its bottoms have the shapes {list(first)} and {list(bottom.shape)}: they "
                    f"must be equal but for axis {along}"
                )
        return torch.cat(bottoms, along)


class Slice(Layer):
    tops = (1, MANY)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.slice_param
        if own.has("slice_dim") and own.has("axis"):
            raise ValueError("it has both axis and slice_dim, its old form: use axis")
        self.axis = own.slice_dim if own.has("slice_dim") else own.axis

    def forward(self, bottom: Tensor) -> tuple[Tensor, ...]:
        axis = axis_of(self.axis, bottom.dim())
        return bottom.split(self._sizes(bottom.shape[axis]), axis)

    def _sizes(self, size: int) -> list[int]:
        points, tops = list(self.spec.slice_param.slice_point), len(self.spec.top)
        if not points:
            if size % tops:
                raise ValueError(f"{size} cannot be cut into {tops} equal parts: give slice points")
            return [size // tops] * tops
        ends = [0, *points, size]
        if len(points) != tops - 1 or any(b <= a for a, b in pairwise(ends)):
            raise ValueError(
                f"its slice points {points} must be {tops - 1}, rising, between 0 and {size}"
            )
        return [b - a for a, b in pairwise(ends)]


class Split(Layer):
    tops = (1, MANY)

    def forward(self, bottom: Tensor) -> tuple[Tensor, ...]:
        return tuple(bottom.view_as(bottom) for _ in self.spec.top)


class Silence(Layer):
    bottoms = (1, MANY)
    tops = (0, 0)

    def forward(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        return ()


class Flatten(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        own = self.spec.flatten_param
        first = axis_of(own.axis, bottom.dim())
        last = axis_of(own.end_axis, bottom.dim(), "end_axis")
        if last < first:
            raise ValueError(f"its end_axis {last} is before its axis {first}")
        return bottom.flatten(first, last)


class Reshape(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        own = self.spec.reshape_param
        axes = bottom.dim()
        start = own.axis if own.axis >= 0 else axes + own.axis + 1
        if not 0 <= start <= axes:
            raise ValueError(f"axis {own.axis} is not one of its bottom's {axes} axes")
        stop = axes if own.num_axes == -1 else start + own.num_axes
        if own.num_axes < -1 or stop > axes:
            raise ValueError(f"num_axes {own.num_axes} from axis {start} are more than there are")
        wanted = list(own.shape.dim)
        for position, size in enumerate(wanted):
            if size == 0:
                if start + position >= axes:
                    raise ValueError(f"dim 0 copies axis {start + position}, which is not there")
                wanted[position] = bottom.shape[start + position]
        if wanted.count(-1) > 1 or min(wanted, default=0) < -1:
            raise ValueError(f"its dims {wanted} must be 0, above 0, or once -1")
        shape = [*bottom.shape[:start], *wanted, *bottom.shape[stop:]]
        known = count([size for size in shape if size != -1])
        fits = known and bottom.numel() % known == 0 if -1 in shape else known == bottom.numel()
        if not fits:
            raise ValueError(f"{list(bottom.shape)} cannot be reshaped to {shape}")
        return bottom.reshape(shape)


class Tile(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        own = self.spec.tile_param
        if own.tiles < 1:
            raise ValueError(f"tiles is {own.tiles}: give 1 or more")
        repeats = [1] * bottom.dim()
        repeats[axis_of(own.axis, bottom.dim())] = own.tiles
        return bottom.repeat(repeats)


class Crop(Layer):
    """Cuts the first bottom to the size of the second, from an axis on."""

    bottoms = (2, 2)

    def forward(self, bottom: Tensor, like: Tensor) -> Tensor:
        own = self.spec.crop_param
        first = axis_of(own.axis, bottom.dim())
        offsets = list(own.offset) or [0]
        if len(offsets) == 1:
            offsets *= bottom.dim() - first
        if len(offsets) != bottom.dim() - first or like.dim() != bottom.dim():
            raise ValueError(f"give one offset, or one for each of {bottom.dim() - first} axes")
        for axis, offset in enumerate(offsets, first):
            if offset + like.shape[axis] > bottom.shape[axis]:
                raise ValueError(f"its offset {offset} leaves too little along axis {axis}")
            bottom = bottom.narrow(axis, offset, like.shape[axis])
        return bottom


class Eltwise(Layer):
    """Product, weighted sum or maximum of several bottoms."""

    bottoms = (2, MANY)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.eltwise_param
        self.coefficients = [float(one) for one in own.coeff] or [1.0] * len(shapes)
        if own.has("coeff") and (len(own.coeff) != len(shapes) or own.operation == "PROD"):
            raise ValueError("coeff must be given once per bottom, and not for PROD")

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        if any(other.shape != first.shape for other in others):
            shapes = [list(one.shape) for one in (first, *others)]
            raise ValueError(f"its bottoms have several shapes: {shapes}")
        operation = self.spec.eltwise_param.operation
        if operation == "SUM":
            top = first if self.coefficients[0] == 1 else first * self.coefficients[0]
            for other, weight in zip(others, self.coefficients[1:], strict=True):
                top = top.add(other, alpha=weight)
            return top
        top = first
        for number, other in enumerate(others):
            if operation == "PROD":
                top = top * other
            elif number == 0:  # Of equal values the second has the gradient, of later ones none.
                top = torch.where(top > other, top, other)
            else:
                top = torch.where(other > top, other, top)
        return top


class Reduction(Layer):
    """Sum, sum of magnitudes or squares, or mean, over all axes from one on."""

    def forward(self, bottom: Tensor) -> Tensor:
        own = self.spec.reduction_param
        first = axis_of(own.axis, bottom.dim())
        values = bottom.flatten(first)
        if own.operation == "ASUM":
            values = values.abs()
        elif own.operation == "SUMSQ":
            values = values * values
        total = values.mean(first) if own.operation == "MEAN" else values.sum(first)
        return total * own.coeff


class ArgMax(Layer):
    """The places, or the values, of the largest; of equal ones the last.

    Without an axis each image is looked at as a whole, and the result has three axes or more: the
    image, what is told of it, and the best.
    """

    def forward(self, bottom: Tensor) -> Tensor:
        own = self.spec.argmax_param
        has_axis = own.has("axis")
        axis = axis_of(own.axis, bottom.dim()) if has_axis else 1
        values = (bottom if has_axis else bottom.reshape(bottom.shape[0], -1)).detach()
        size = values.shape[axis]
        if not 1 <= own.top_k <= size:
            raise ValueError(f"top_k is {own.top_k}: give 1 to {size}")
        ordered, places = values.flip(axis).sort(dim=axis, descending=True, stable=True)
        best = ordered.narrow(axis, 0, own.top_k)
        where = (size - 1 - places.narrow(axis, 0, own.top_k)).to(bottom.dtype)
        if has_axis:
            return best if own.out_max_val else where
        told = torch.stack([where, best] if own.out_max_val else [where], 1)
        return told.reshape(*told.shape, *(1,) * (bottom.dim() - 3))
