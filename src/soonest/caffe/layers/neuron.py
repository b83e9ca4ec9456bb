"""Layers that work on each value by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from soonest.caffe.layers.base import Layer, Shape, filler
from soonest.caffe.proto.message import Message


class ReLU(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        slope = self.spec.relu_param.negative_slope
        return functional.leaky_relu(bottom, slope) if slope else functional.relu(bottom)


class PReLU(Layer):
    """Weights: (channels), or one number if they share it."""

    weight: Tensor

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.prelu_param
        if len(shapes[0]) < 2:
            raise ValueError(f"its bottom must have 2 axes or more, not {list(shapes[0])}")
        shape = () if own.channel_shared else (shapes[0][1],)
        self.add_blob("weight", shape, own.filler if own.has("filler") else filler(0.25))

    def forward(self, bottom: Tensor) -> Tensor:
        return functional.prelu(bottom, self.weight.reshape(-1))


class ELU(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        return functional.elu(bottom, self.spec.elu_param.alpha)


class Sigmoid(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        return torch.sigmoid(bottom)


class TanH(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        return torch.tanh(bottom)


class Swish(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        return bottom * torch.sigmoid(self.spec.swish_param.beta * bottom)


class Clip(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        # One after the other: of a min above the max Caffe takes the min, clamp would the max.
        own = self.spec.clip_param
        return bottom.clamp(max=own.max).clamp(min=own.min)


class Threshold(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        return (bottom > self.spec.threshold_param.threshold).to(bottom.dtype)


class AbsVal(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        return bottom.abs()


class BNLL(Layer):
    """log(1 + exp(x))."""

    def forward(self, bottom: Tensor) -> Tensor:
        return functional.softplus(bottom)


class Power(Layer):
    """(shift + scale·x) to the given power."""

    def forward(self, bottom: Tensor) -> Tensor:
        own = self.spec.power_param
        if own.power * own.scale == 0:
            return torch.full_like(bottom, own.shift) ** own.power
        inner = bottom * own.scale + own.shift
        return inner if own.power == 1 else inner**own.power


class _WithBase(Layer):
    """Something to a base; -1 stands for e."""

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self.own = self._own()
        if self.own.base <= 0 and self.own.base != -1:
            raise ValueError(f"its base is {self.own.base:g}: give one above 0, or -1 for e")
        self.log_base = 1.0 if self.own.base == -1 else math.log(self.own.base)

    def _own(self) -> Message:
        raise NotImplementedError


class Exp(_WithBase):
    """The base to the power of (shift + scale·x)."""

    def _own(self) -> Message:
        return self.spec.exp_param

    def forward(self, bottom: Tensor) -> Tensor:
        inner = bottom * (self.own.scale * self.log_base)
        with np.errstate(over="ignore"):  # Then it is infinite, as in Caffe.
            outer = float(np.exp(self.own.shift * self.log_base))
        return torch.exp(inner) * outer


class Log(_WithBase):
    """The logarithm of (shift + scale·x)."""

    def _own(self) -> Message:
        return self.spec.log_param

    def forward(self, bottom: Tensor) -> Tensor:
        return torch.log(bottom * self.own.scale + self.own.shift) / self.log_base


class Dropout(Layer):
    """Scales what stays while training, so testing changes nothing."""

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self.ratio = spec.dropout_param.dropout_ratio
        self.drops = phase == "TRAIN"
        if not 0 <= self.ratio <= 1 or (self.drops and self.ratio == 1):
            raise ValueError(f"its dropout_ratio is {self.ratio:g}: give 0 or more, below 1")

    def forward(self, bottom: Tensor) -> Tensor:
        return functional.dropout(bottom, self.ratio, training=self.drops)
