"""What every layer has: blobs that a file holds, and a rule for how many bottoms and tops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from soonest.caffe.layers.fillers import check, filled
from soonest.caffe.proto.message import Message

Shape = tuple[int, ...]
MANY = 10**9
MOST_VALUES = 2**31 - 1
"""Of a blob, as in Caffe."""


class Layer(nn.Module):
    """One layer of a net.

    A layer is made for the shapes of what it reads, on the device ``meta``: it holds no memory
    until ``fill``. What it writes has the shapes that ``forward`` gives there, so no layer has a
    rule for shapes besides its computation.

    Args:
        spec: its ``LayerParameter``.
        shapes: of its bottoms.
        phase: ``TRAIN`` or ``TEST``.

    Raises:
        ValueError: it cannot be made so.
    """

    bottoms: tuple[int, int] = (1, 1)
    """The fewest and the most it reads."""
    tops: tuple[int, int] = (1, 1)
    """The fewest and the most it writes."""
    paired = False
    """Whether it writes as many as it reads, each made of one."""
    is_loss = False
    """Whether its first top counts in the loss unless the net says otherwise."""

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__()
        self.spec = spec
        self.phase = phase
        self.blob_names: list[str] = []
        """Attributes that files hold, in their order there."""
        self._fillers: dict[str, Message] = {}
        self.looks: dict[str, tuple[Layer, str, Shape]] = {}
        """Of blobs that are another layer's, whose and which they are, and their shape here."""
        _in_range(len(shapes), self.bottoms, "bottom")
        _in_range(len(spec.top), self.tops, "top")
        if self.paired and len(shapes) != len(spec.top):
            raise ValueError(f"it has {len(shapes)} bottoms and {len(spec.top)} tops: give as many")

    def add_blob(self, name: str, shape: Shape, filler: Message, *, learned: bool = True) -> None:
        """Gives the layer a blob, empty until ``fill``.

        Args:
            name: of the attribute.
            shape: of it.
            filler: how it starts, a ``FillerParameter``.
            learned: whether it has a gradient; otherwise it is a buffer.
        """
        check_shape(shape, name)
        check(shape, filler)
        empty = torch.empty(shape, device="meta")
        if learned:
            self.register_parameter(name, nn.Parameter(empty))
        else:
            self.register_buffer(name, empty)
        self.blob_names.append(name)
        self._fillers[name] = filler

    def look_at(self, name: str, owner: Layer, owner_name: str) -> None:
        """Lets a blob be that of another layer from now on, in the shape that it has here.

        Args:
            name: of the blob.
            owner: whose it is.
            owner_name: as it is named there.
        """
        self.looks[name] = (owner, owner_name, tuple(getattr(self, name).shape))
        delattr(self, name)

    def __getattr__(self, name: str) -> Any:
        looks = self.__dict__.get("looks", {})
        if name in looks:
            owner, owner_name, shape = looks[name]
            return getattr(owner, owner_name).view(shape)
        return super().__getattr__(name)

    def blobs(self) -> list[Tensor]:
        """What files hold of this layer, in their order there."""
        return [getattr(self, name) for name in self.blob_names]

    def fill(self, name: str, generator: torch.Generator) -> None:
        """Gives a blob memory and its first values.

        Args:
            name: of the blob.
            generator: of random numbers.
        """
        old = getattr(self, name)
        values = filled(tuple(old.shape), self._fillers[name], generator)
        if isinstance(old, nn.Parameter):
            setattr(self, name, nn.Parameter(values))
        else:
            setattr(self, name, values)

    def share(self, rank: int, ranks: int, *, divide: bool = False) -> None:
        """Tells it which of several ranks this is; most layers need not know.

        Args:
            rank: this one.
            ranks: how many.
            divide: whether batches are those of all ranks, not of each.

        Raises:
            ValueError: the batch cannot be divided.
        """

    def infer(self, *bottoms: Tensor) -> Any:
        """The tops, or one, with no values but their shapes; bottoms are without values, too."""
        return self(*bottoms)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(getattr(self, name).shape)}" for name in self.blob_names)


def _in_range(count: int, allowed: tuple[int, int], what: str) -> None:
    fewest, most = allowed
    if not fewest <= count <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} or more"
        if fewest < most < MANY:
            wanted = f"{fewest} to {most}"
        raise ValueError(f"it has {count} {what}s: it takes {wanted}")


def gradient(blob: Tensor) -> Tensor | None:
    """Of a blob, also where it is another one's in a shape of its own; None if it has none."""
    is_own = isinstance(blob, nn.Parameter) or blob._base is None
    owner = blob if is_own else blob._base
    assert owner is not None
    return None if owner.grad is None else owner.grad.detach().view(blob.shape)


def axis_of(axis: int, dimensions: int, name: str = "axis") -> int:
    """An axis counted from the front; Caffe's may be counted from the end, below zero."""
    if not -dimensions <= axis < dimensions:
        raise ValueError(f"{name} {axis} is not one of its bottom's {dimensions} axes")
    return axis % dimensions


def count(shape: Sequence[int]) -> int:
    """How many values a shape holds."""
    return math.prod(shape)


def check_shape(shape: Sequence[int], what: str) -> None:
    """Raises ValueError if no blob can have this shape.

    Args:
        shape: of the blob.
        what: it is, for errors.
    """
    if any(size < 1 for size in shape):
        raise ValueError(f"its {what} would have the shape {list(shape)}: give sizes above 0")
    if count(shape) > MOST_VALUES:
        raise ValueError(
            f"its {what} would have the shape {list(shape)}: a blob has at most {MOST_VALUES} "
            "values"
        )


def filler(value: float) -> Message:
    """A filler with a constant."""
    return Message("FillerParameter", value=value)
