"""How layers that learn nothing are written in plain torch, but for the simplest."""

from __future__ import annotations

import torch

from soonest.caffe.layers.base import axis_of
from soonest.caffe.tools.torch_part import Part


def power(part: Part) -> str:
    own = part.spec.power_param
    inner = f"({part.x} * {own.scale:.9g} + {own.shift:.9g})"
    return inner if own.power == 1 else f"{inner} ** {own.power:.9g}"


def exp(part: Part) -> str:
    own, log_base = part.spec.exp_param, part.layer.log_base
    return f"torch.exp(({part.x} * {own.scale:.9g} + {own.shift:.9g}) * {log_base:.9g})"


def log(part: Part) -> str:
    own = part.spec.log_param
    return f"torch.log({part.x} * {own.scale:.9g} + {own.shift:.9g}) / {part.layer.log_base:.9g}"


def eltwise(part: Part) -> str:
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


def reshape(part: Part) -> str:
    own, axes = part.spec.reshape_param, len(part.shapes[0])
    start = own.axis if own.axis >= 0 else axes + own.axis + 1
    stop = axes if own.num_axes == -1 else start + own.num_axes
    copied = [f"{part.x}.shape[{axis}]" for axis in range(axes)]
    wanted = [
        copied[start + place] if size == 0 else str(size)
        for place, size in enumerate(own.shape.dim)
    ]
    return f"{part.x}.reshape({', '.join([*copied[:start], *wanted, *copied[stop:]])})"


def flatten(part: Part) -> str:
    own = part.spec.flatten_param
    return f"{part.x}.flatten({own.axis}, {own.end_axis})"


def cut(part: Part) -> str:
    axis = axis_of(part.layer.axis, len(part.shapes[0]))
    tops = part.layer(torch.empty(part.shapes[0], device="meta"))
    return f"{part.x}.split({[top.shape[axis] for top in tops]}, {axis})"


def tile(part: Part) -> str:
    own, axes = part.spec.tile_param, len(part.shapes[0])
    repeats = [1] * axes
    repeats[axis_of(own.axis, axes)] = own.tiles
    return f"{part.x}.repeat({', '.join(map(str, repeats))})"


def crop(part: Part) -> str:
    own, axes = part.spec.crop_param, len(part.shapes[0])
    first = axis_of(own.axis, axes)
    offsets = list(own.offset) or [0]
    offsets = offsets if len(offsets) > 1 else offsets * (axes - first)
    top = part.x
    for axis, offset in enumerate(offsets, first):
        top += f".narrow({axis}, {offset}, {part.bottoms[1]}.shape[{axis}])"
    return top


def reduction(part: Part) -> str:
    own, axes = part.spec.reduction_param, len(part.shapes[0])
    values = {"ASUM": f"{part.x}.abs()", "SUMSQ": f"({part.x} * {part.x})"}.get(
        own.operation, part.x
    )
    total = "mean" if own.operation == "MEAN" else "sum"
    top = f"{values}.{total}({tuple(range(axis_of(own.axis, axes), axes))})"
    return top if own.coeff == 1 else f"{top} * {own.coeff:.9g}"


def argmax(part: Part) -> str:
    own = part.spec.argmax_param
    if own.top_k != 1 or own.out_max_val:
        raise ValueError("more than the place of the largest has no like in torch")
    if own.has("axis"):
        return f"{part.x}.argmax({own.axis}, keepdim=True).to({part.x}.dtype)"
    shape = ", ".join(["-1", *["1"] * max(2, len(part.shapes[0]) - 1)])
    return f"{part.x}.flatten(1).argmax(1).reshape({shape}).to({part.x}.dtype)"
