"""How blobs start: Caffe's fillers.

Values are as likely as Caffe's, but not the same: its random numbers are others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from soonest.caffe.proto.message import Message

Shape = tuple[int, ...]


def filled(shape: Shape, spec: Message, generator: torch.Generator) -> Tensor:
    """A new tensor.

    Args:
        shape: of it.
        spec: a ``FillerParameter``.
        generator: of random numbers.

    Raises:
        ValueError: there is no such filler, or it cannot fill this shape.
    """
    check(shape, spec)
    try:
        tensor = torch.empty(shape)
    except RuntimeError:
        raise ValueError(f"there is not enough memory for a blob of shape {list(shape)}") from None
    FILLERS[spec.type](tensor, spec, generator)
    return tensor


def check(shape: Shape, spec: Message) -> None:
    """Raises ValueError if there is no such filler, or it cannot fill this shape."""
    if spec.type not in FILLERS:
        raise ValueError(f"no filler {spec.type!r} exists: take one of {', '.join(FILLERS)}")
    if spec.sparse != -1 and spec.type != "gaussian":
        raise ValueError(f"a filler of type {spec.type!r} cannot be sparse: only gaussian can")
    if spec.type == "gaussian" and not 0 <= spec.std < math.inf:
        raise ValueError(f"a gaussian filler's std is {spec.std:g}: give 0 or more")
    if spec.type == "uniform" and not -math.inf < spec.min <= spec.max < math.inf:
        raise ValueError(f"a uniform filler's min is {spec.min:g}, its max {spec.max:g}")
    if spec.type == "bilinear" and (len(shape) != 4 or shape[2] != shape[3]):
        raise ValueError(f"the filler 'bilinear' takes square filters of 4 axes, not {list(shape)}")


def _constant(tensor: Tensor, spec: Message, generator: torch.Generator) -> None:
    tensor.fill_(spec.value)


def _uniform(tensor: Tensor, spec: Message, generator: torch.Generator) -> None:
    tensor.uniform_(spec.min, spec.max, generator=generator)


def _gaussian(tensor: Tensor, spec: Message, generator: torch.Generator) -> None:
    tensor.normal_(spec.mean, spec.std, generator=generator)
    if spec.sparse >= 0 and tensor.numel():
        # On average this many inputs of each output are not zero.
        share = min(1.0, spec.sparse / tensor.shape[0])
        tensor *= torch.empty_like(tensor).bernoulli_(share, generator=generator)


def _fan(tensor: Tensor, spec: Message) -> float:
    fan_in = tensor.numel() / tensor.shape[0] if tensor.dim() else 1.0
    fan_out = tensor.numel() / tensor.shape[1] if tensor.dim() > 1 else float(tensor.numel())
    return {"FAN_IN": fan_in, "FAN_OUT": fan_out, "AVERAGE": (fan_in + fan_out) / 2}[
        spec.variance_norm
    ]


def _xavier(tensor: Tensor, spec: Message, generator: torch.Generator) -> None:
    limit = math.sqrt(3 / _fan(tensor, spec))
    tensor.uniform_(-limit, limit, generator=generator)


def _msra(tensor: Tensor, spec: Message, generator: torch.Generator) -> None:
    tensor.normal_(0, math.sqrt(2 / _fan(tensor, spec)), generator=generator)


def _positive_unitball(tensor: Tensor, spec: Message, generator: torch.Generator) -> None:
    rows = tensor.uniform_(0, 1, generator=generator).view(tensor.shape[0], -1)
    rows /= rows.sum(dim=1, keepdim=True)


def _bilinear(tensor: Tensor, spec: Message, generator: torch.Generator) -> None:
    size = tensor.shape[3]
    half = math.ceil(size / 2)
    centre = (size - 1) / (2 * half)
    along = 1 - (torch.arange(size) / half - centre).abs()
    tensor.copy_(torch.outer(along, along).expand_as(tensor))


FILLERS: dict[str, Callable[[Tensor, Message, torch.Generator], None]] = {
    "constant": _constant,
    "gaussian": _gaussian,
    "uniform": _uniform,
    "xavier": _xavier,
    "msra": _msra,
    "positive_unitball": _positive_unitball,
    "bilinear": _bilinear,
}
"""Per type, what writes the values."""
