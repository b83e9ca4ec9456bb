"""Layers that normalise: batch normalisation, local response, mean and variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from soonest.caffe.layers.base import Layer, Shape, filler
from soonest.caffe.proto.message import Message


class BatchNorm(Layer):
    """Normalises each channel; it has no scale and shift of its own, that is what Scale is for.

    It keeps the sum of the means, that of the unbiased variances, each older one weighted less, and
    the sum of the weights, by which both are divided.
    """

    mean: Tensor
    variance: Tensor
    scale: Tensor

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.batch_norm_param
        self.eps = own.eps
        self.fraction = own.moving_average_fraction
        self.stored = own.use_global_stats if own.has("use_global_stats") else phase == "TEST"
        channels = shapes[0][1] if len(shapes[0]) > 1 else 1
        for name, size in (("mean", channels), ("variance", channels), ("scale", 1)):
            self.add_blob(name, (size,), filler(0), learned=False)

    def forward(self, bottom: Tensor) -> Tensor:
        values = bottom.unsqueeze(1) if bottom.dim() == 1 else bottom
        if self.stored:
            weight = torch.where(self.scale == 0, 0.0, 1 / self.scale)
            mean, variance = self.mean * weight, self.variance * weight
            top = functional.batch_norm(values, mean, variance, training=False, eps=self.eps)
        else:
            # Not empty: they count for nothing, but nothing times NaN is NaN.
            mean, variance = torch.zeros_like(self.mean), torch.zeros_like(self.variance)
            if values.numel() == values.shape[1] == len(mean):  # One each, which is the mean.
                top, mean = values - values, values.detach().flatten()
            else:
                # A momentum of 1 makes the running statistics those of this batch.
                top = functional.batch_norm(
                    values, mean, variance, training=True, momentum=1.0, eps=self.eps
                )
            if not bottom.is_meta:
                with torch.no_grad():
                    self.scale.mul_(self.fraction).add_(1)
                    self.mean.mul_(self.fraction).add_(mean)
                    self.variance.mul_(self.fraction).add_(variance)
        return top.reshape(bottom.shape)


class LRN(Layer):
    """Local response normalisation, across channels or within each."""

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.lrn_param
        self.size, self.alpha, self.beta, self.k = own.local_size, own.alpha, own.beta, own.k
        self.within = own.norm_region == "WITHIN_CHANNEL"
        if self.size % 2 == 0:
            raise ValueError(f"its local_size is {self.size}: give an odd one")

    def forward(self, bottom: Tensor) -> Tensor:
        if bottom.dim() != 4:
            raise ValueError(f"its bottom must have 4 axes, not the shape {list(bottom.shape)}")
        if not self.within:
            return functional.local_response_norm(bottom, self.size, self.alpha, self.beta, self.k)
        # Caffe takes 1 here for whatever k it is given.
        mean = functional.avg_pool2d(bottom * bottom, self.size, 1, self.size // 2)
        return bottom * (1 + self.alpha * mean) ** -self.beta


class MVN(Layer):
    """Mean and variance normalisation of each image, or each of its channels.

    It has four axes whatever its bottom has.
    """

    def forward(self, bottom: Tensor) -> Tensor:
        own = self.spec.mvn_param
        if bottom.dim() > 4:
            raise ValueError(f"its bottom must have 4 axes or less, not {list(bottom.shape)}")
        values = bottom.reshape(*bottom.shape, *(1,) * (4 - bottom.dim()))
        axes = (1, 2, 3) if own.across_channels else (2, 3)
        if own.normalize_variance:
            return _Normalised.apply(values, axes, own.eps)
        return values - values.mean(axes, keepdim=True)


class _Normalised(torch.autograd.Function):
    """Values less their mean, over their deviation plus eps, with a gradient as if eps were 0."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
        centred = values - values.mean(axes, keepdim=True)
        deviation = (centred * centred).mean(axes, keepdim=True).sqrt() + eps
        top = centred / deviation
        ctx.save_for_backward(top, deviation)
        ctx.axes = axes
        return top

    @staticmethod
    def backward(ctx: Any, *sent: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = sent
        top, deviation = ctx.saved_tensors
        along = (gradient * top).mean(ctx.axes, keepdim=True)
        mean = gradient.mean(ctx.axes, keepdim=True)
        return (gradient - mean - top * along) / deviation, None, None
