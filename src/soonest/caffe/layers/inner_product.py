"""Layers that multiply by a matrix or look up its rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from soonest.caffe.layers.base import Layer, Shape, axis_of, count
from soonest.caffe.proto.message import Message


class InnerProduct(Layer):
    """Weights: (num_output, inputs), or the transpose of that if asked for."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.inner_product_param
        self.axis = axis_of(own.axis, len(shapes[0]))
        self.transpose = own.transpose
        shape = (own.num_output, count(shapes[0][self.axis :]))
        self.add_blob("weight", shape[::-1] if self.transpose else shape, own.weight_filler)
        if own.bias_term:
            self.add_blob("bias", (own.num_output,), own.bias_filler)
        else:
            self.register_parameter("bias", None)

    def forward(self, bottom: Tensor) -> Tensor:
        weight = self.weight.t() if self.transpose else self.weight
        values = bottom.reshape(*bottom.shape[: self.axis], -1)
        if values.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"its bottom of the shape {list(bottom.shape)} has {values.shape[-1]} values from "
                f"axis {self.axis} on, but its weights are for {weight.shape[1]}"
            )
        return functional.linear(values, weight, self.bias)


class Embed(Layer):
    """Weights: (input_dim, num_output)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.embed_param
        self.add_blob("weight", (own.input_dim, own.num_output), own.weight_filler)
        if own.bias_term:
            self.add_blob("bias", (own.num_output,), own.bias_filler)
        else:
            self.register_parameter("bias", None)

    def forward(self, bottom: Tensor) -> Tensor:
        words, most = bottom.long(), len(self.weight)
        if words.device.type == "cpu" and ((words < 0) | (words >= most)).any():
            raise ValueError(f"its bottom has a value that is not one of 0 to {most - 1}")
        top = functional.embedding(words, self.weight)
        return top if self.bias is None else top + self.bias
