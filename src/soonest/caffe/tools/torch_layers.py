"""How each type of layer is written in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from soonest.caffe.layers.base import Layer, Shape
from soonest.caffe.tools import torch_values as values
from soonest.caffe.tools.torch_part import Part


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
    "Power": values.power,
    "Exp": values.exp,
    "Log": values.log,
    "Dropout": lambda part: (
        f"{part.module(f'nn.Dropout({part.spec.dropout_param.dropout_ratio:.9g})')}({part.x})"
    ),
    "Concat": lambda part: f"torch.cat(({', '.join(part.bottoms)}), {part.layer.axis})",
    "Slice": values.cut,
    "Split": lambda part: ", ".join([part.x] * len(part.spec.top)),
    "Flatten": values.flatten,
    "Reshape": values.reshape,
    "Tile": values.tile,
    "Crop": values.crop,
    "Eltwise": values.eltwise,
    "Reduction": values.reduction,
    "ArgMax": values.argmax,
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
