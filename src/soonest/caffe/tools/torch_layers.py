"""How each type of layer is written in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from soonest.caffe.layers.base import Layer, Shape, axis_of
from soonest.caffe.message import Message


@dataclass
class Part:
    """A layer on its way to torch.

    Attributes:
        layer: as we have it, with its weights.
        spec: its ``LayerParameter``.
        name: of its attribute in the module.
        bottoms: the variables that it reads.
        shapes: of these.
        modules: what the module makes at its start, by attribute.
        state: tensors of the module's state.
        owners: per name in that, which of the layer's own tensors it is, by identity, if it is one.
    """

    layer: Any
    spec: Message
    name: str
    bottoms: list[str]
    shapes: list[Shape]
    modules: dict[str, str] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)

    @property
    def x(self) -> str:
        return self.bottoms[0]

    def module(self, made: str, **state: Tensor | None) -> str:
        """Gives the module a part with these tensors, and calls it."""
        self.modules[self.name] = made
        self.keep(f"{self.name}.", state)
        return f"self.{self.name}"

    def parameter(self, suffix: str, value: Tensor) -> str:
        """Gives the module a parameter of its own."""
        name = f"{self.name}_{suffix}"
        self.modules[name] = f"nn.Parameter(torch.empty({tuple(value.shape)}))"
        self.keep("", {name: value})
        return f"self.{name}"

    def keep(self, prefix: str, state: dict[str, Tensor | None]) -> None:
        for key, value in state.items():
            if value is not None:
                self.state[prefix + key] = value.detach().clone()
                if any(value is blob for blob in self.layer.blobs()):
                    self.owners[prefix + key] = id(value)


def _convolution(part: Part) -> str:
    layer, transposed = part.layer, part.spec.type == "Deconvolution"
    if part.spec.convolution_param.axis != 1 or len(part.shapes[0]) < 3:
        raise ValueError("a convolution along another axis than 1 has no like in torch")
    weight: Tensor = layer.weight
    group = part.spec.convolution_param.group
    first, second, kernel = weight.shape[0], weight.shape[1] * group, tuple(weight.shape[2:])
    channels, outputs = (first, second) if transposed else (second, first)
    more = [
        f"{name}={value}"
        for name, value, usual in (
            ("stride", tuple(layer.stride), 1),
            ("padding", tuple(layer.padding), 0),
            ("dilation", tuple(layer.dilation), 1),
        )
        if set(value) != {usual}
    ]
    more += [f"groups={group}"] if group > 1 else []
    more += ["bias=False"] if layer.bias is None else []
    kind = f"nn.Conv{'Transpose' if transposed else ''}{len(kernel)}d"
    made = f"{kind}({', '.join([str(channels), str(outputs), str(kernel), *more])})"
    called = part.module(made, weight=weight, bias=layer.bias)
    return ", ".join(f"{called}({bottom})" for bottom in part.bottoms)


def _inner_product(part: Part) -> str:
    layer = part.layer
    weight = layer.weight.t() if layer.transpose else layer.weight
    made = f"nn.Linear({weight.shape[1]}, {weight.shape[0]}, bias={layer.bias is not None})"
    called = part.module(made, weight=weight, bias=layer.bias)
    return f"{called}({part.x}.flatten({layer.axis}))"


def _embed(part: Part) -> str:
    weight = part.layer.weight
    called = part.module(f"nn.Embedding({weight.shape[0]}, {weight.shape[1]})", weight=weight)
    top = f"{called}({part.x}.long())"
    return top if part.layer.bias is None else f"{top} + {part.parameter('bias', part.layer.bias)}"


def _pooling(part: Part) -> str:
    own, shape = part.spec.pooling_param, part.shapes[0]
    if own.pool == "STOCHASTIC" or len(part.spec.top) > 1 or len(shape) != 4:
        raise ValueError("this kind of pooling has no like in torch")
    if own.global_pooling:
        operation = "amax" if own.pool == "MAX" else "mean"
        return f"{part.x}.{operation}((2, 3), keepdim=True)"
    kernel, stride, pad = (
        tuple(getattr(own, one) if own.has(one) else getattr(own, both) for one in (high, wide))
        for both, high, wide in (
            ("kernel_size", "kernel_h", "kernel_w"),
            ("stride", "stride_h", "stride_w"),
            ("pad", "pad_h", "pad_w"),
        )
    )
    for size, wide, step, rim in zip(shape[2:], kernel, stride, pad, strict=True):
        if 2 * rim > wide or step > wide or wide > size + 2 * rim:
            raise ValueError(
                f"pooling with kernel {wide}, stride {step} and pad {rim} has no like in torch"
            )
    ceil = own.round_mode == "CEIL"
    name = "max_pool2d" if own.pool == "MAX" else "avg_pool2d"
    return f"F.{name}({part.x}, {kernel}, {stride}, {pad}, ceil_mode={ceil})"


def _batch_norm(part: Part) -> str:
    layer, dimensions = part.layer, len(part.shapes[0])
    if dimensions < 2 or dimensions > 5:
        raise ValueError(f"normalising {dimensions} axes has no like in torch")
    factor = 1 / layer.scale if float(layer.scale) else torch.zeros(1)
    kind = f"nn.BatchNorm{max(1, dimensions - 2)}d"
    momentum = 1 - part.spec.batch_norm_param.moving_average_fraction
    made = f"{kind}({len(layer.mean)}, eps={layer.eps!r}, momentum={momentum:.6g}, affine=False)"
    called = part.module(
        made,
        running_mean=layer.mean * factor,
        running_var=layer.variance * factor,
        num_batches_tracked=torch.tensor(0),
    )
    return f"{called}({part.x})"


def _spread(operand: str, axis: int, shape: Shape, axes: int) -> str:
    rest = axes - axis - len(shape)
    return f"{operand}[...{', None' * rest}]" if rest else operand


def _scale(part: Part) -> str:
    layer, axes = part.layer, len(part.shapes[0])
    if len(part.bottoms) > 1:
        shape, operand = part.shapes[1], part.bottoms[1]
    else:
        shape, operand = tuple(layer.weight.shape), part.parameter("scale", layer.weight)
    top = f"{part.x} * {_spread(operand, layer.axis, shape, axes)}"
    if layer.bias is None:
        return top
    bias = part.parameter("bias", layer.bias)
    return f"{top} + {_spread(bias, layer.axis, tuple(layer.bias.shape), axes)}"


def _bias(part: Part) -> str:
    layer, axes = part.layer, len(part.shapes[0])
    if len(part.bottoms) > 1:
        shape, operand = part.shapes[1], part.bottoms[1]
    else:
        shape, operand = tuple(layer.bias.shape), part.parameter("bias", layer.bias)
    return f"{part.x} + {_spread(operand, layer.axis, shape, axes)}"


def _lrn(part: Part) -> str:
    own = part.spec.lrn_param
    if own.norm_region != "WITHIN_CHANNEL":
        return (
            f"F.local_response_norm({part.x}, {own.local_size}, {own.alpha:.9g}, {own.beta:.9g}, "
            f"{own.k:.9g})"
        )
    pooled = f"F.avg_pool2d({part.x} * {part.x}, {own.local_size}, 1, {own.local_size // 2})"
    return f"{part.x} * (1 + {own.alpha:.9g} * {pooled}) ** -{own.beta:.9g}"


def _mvn(part: Part) -> str:
    own = part.spec.mvn_param
    axes = tuple(range(1 if own.across_channels else 2, len(part.shapes[0])))
    centred = f"({part.x} - {part.x}.mean({axes}, keepdim=True))"
    if not own.normalize_variance:
        return centred
    return f"{centred} / ({part.x}.std({axes}, correction=0, keepdim=True) + {own.eps:.9g})"


def _prelu(part: Part) -> str:
    weight = part.layer.weight.reshape(-1)
    return f"{part.module(f'nn.PReLU({len(weight)})', weight=weight)}({part.x})"


def _relu(part: Part) -> str:
    slope = part.spec.relu_param.negative_slope
    return f"F.leaky_relu({part.x}, {slope:.9g})" if slope else f"F.relu({part.x})"


def _power(part: Part) -> str:
    own = part.spec.power_param
    inner = f"({part.x} * {own.scale:.9g} + {own.shift:.9g})"
    return inner if own.power == 1 else f"{inner} ** {own.power:.9g}"


def _exp(part: Part) -> str:
    own, log_base = part.spec.exp_param, part.layer.log_base
    return f"torch.exp(({part.x} * {own.scale:.9g} + {own.shift:.9g}) * {log_base:.9g})"


def _log(part: Part) -> str:
    own = part.spec.log_param
    return f"torch.log({part.x} * {own.scale:.9g} + {own.shift:.9g}) / {part.layer.log_base:.9g}"


def _eltwise(part: Part) -> str:
    operation = part.spec.eltwise_param.operation
    if operation == "MAX":
        top = part.x
        for bottom in part.bottoms[1:]:
            top = f"torch.maximum({top}, {bottom})"
        return top
    if operation == "PROD":
        return " * ".join(part.bottoms)
    pairs = zip(part.bottoms, part.layer.coefficients, strict=True)
    return " + ".join(
        bottom if weight == 1 else f"{weight:.9g} * {bottom}" for bottom, weight in pairs
    )


def _reshape(part: Part) -> str:
    own, axes = part.spec.reshape_param, len(part.shapes[0])
    start = own.axis if own.axis >= 0 else axes + own.axis + 1
    stop = axes if own.num_axes == -1 else start + own.num_axes
    copied = [f"{part.x}.shape[{axis}]" for axis in range(axes)]
    wanted = [
        copied[start + place] if size == 0 else str(size)
        for place, size in enumerate(own.shape.dim)
    ]
    return f"{part.x}.reshape({', '.join([*copied[:start], *wanted, *copied[stop:]])})"


def _flatten(part: Part) -> str:
    own = part.spec.flatten_param
    return f"{part.x}.flatten({own.axis}, {own.end_axis})"


def _slice(part: Part) -> str:
    axis = axis_of(part.layer.axis, len(part.shapes[0]))
    tops = part.layer(torch.empty(part.shapes[0], device="meta"))
    return f"{part.x}.split({[top.shape[axis] for top in tops]}, {axis})"


def _tile(part: Part) -> str:
    own, axes = part.spec.tile_param, len(part.shapes[0])
    repeats = [1] * axes
    repeats[axis_of(own.axis, axes)] = own.tiles
    return f"{part.x}.repeat({', '.join(map(str, repeats))})"


def _crop(part: Part) -> str:
    own, axes = part.spec.crop_param, len(part.shapes[0])
    first = axis_of(own.axis, axes)
    offsets = list(own.offset) or [0]
    offsets = offsets if len(offsets) > 1 else offsets * (axes - first)
    top = part.x
    for axis, offset in enumerate(offsets, first):
        top += f".narrow({axis}, {offset}, {part.bottoms[1]}.shape[{axis}])"
    return top


def _reduction(part: Part) -> str:
    own, axes = part.spec.reduction_param, len(part.shapes[0])
    values = {"ASUM": f"{part.x}.abs()", "SUMSQ": f"({part.x} * {part.x})"}.get(
        own.operation, part.x
    )
    total = "mean" if own.operation == "MEAN" else "sum"
    top = f"{values}.{total}({tuple(range(axis_of(own.axis, axes), axes))})"
    return top if own.coeff == 1 else f"{top} * {own.coeff:.9g}"


def _argmax(part: Part) -> str:
    own = part.spec.argmax_param
    if own.top_k != 1 or own.out_max_val:
        raise ValueError("more than the place of the largest has no like in torch")
    if own.has("axis"):
        return f"{part.x}.argmax({own.axis}, keepdim=True).to({part.x}.dtype)"
    shape = ", ".join(["-1", *["1"] * max(2, len(part.shapes[0]) - 1)])
    return f"{part.x}.flatten(1).argmax(1).reshape({shape}).to({part.x}.dtype)"


WRITTEN: dict[str, Callable[[Part], str]] = {
    "Convolution": _convolution,
    "Deconvolution": _convolution,
    "InnerProduct": _inner_product,
    "Embed": _embed,
    "Pooling": _pooling,
    "BatchNorm": _batch_norm,
    "Scale": _scale,
    "Bias": _bias,
    "LRN": _lrn,
    "MVN": _mvn,
    "PReLU": _prelu,
    "ReLU": _relu,
    "ELU": lambda part: f"F.elu({part.x}, {part.spec.elu_param.alpha:.9g})",
    "Sigmoid": lambda part: f"torch.sigmoid({part.x})",
    "TanH": lambda part: f"torch.tanh({part.x})",
    "Swish": lambda part: f"{part.x} * torch.sigmoid({part.spec.swish_param.beta:.9g} * {part.x})",
    "Clip": lambda part: (
        f"{part.x}.clamp({part.spec.clip_param.min:.9g}, {part.spec.clip_param.max:.9g})"
    ),
    "Threshold": lambda part: (
        f"({part.x} > {part.spec.threshold_param.threshold:.9g}).to({part.x}.dtype)"
    ),
    "AbsVal": lambda part: f"{part.x}.abs()",
    "BNLL": lambda part: f"F.softplus({part.x})",
    "Power": _power,
    "Exp": _exp,
    "Log": _log,
    "Dropout": lambda part: (
        f"{part.module(f'nn.Dropout({part.spec.dropout_param.dropout_ratio:.9g})')}({part.x})"
    ),
    "Concat": lambda part: f"torch.cat(({', '.join(part.bottoms)}), {part.layer.axis})",
    "Slice": _slice,
    "Split": lambda part: ", ".join([part.x] * len(part.spec.top)),
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Tile": _tile,
    "Crop": _crop,
    "Eltwise": _eltwise,
    "Reduction": _reduction,
    "ArgMax": _argmax,
    "Softmax": lambda part: f"torch.softmax({part.x}, {part.spec.softmax_param.axis})",
}
"""Per type of layer, what writes it: an expression of its tops."""


def written(layer: Layer, name: str, bottoms: Sequence[str], shapes: Sequence[Shape]
            ) -> tuple[str, Part]:  # fmt: skip
    """An expression for a layer's tops, and what the module must have for it.

    Raises:
        ValueError: torch has nothing like it.
    """
    part = Part(layer, layer.spec, name, list(bottoms), list(shapes))
    if layer.spec.type not in WRITTEN:
        raise ValueError(f"the type {layer.spec.type!r} has no like in plain torch")
    return WRITTEN[layer.spec.type](part), part
