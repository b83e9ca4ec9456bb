"""Blobs that several layers share by name, and what is learned of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soonest.caffe.layers.base import Layer, count
from soonest.caffe.proto.message import Message


@dataclass
class Blob:
    """A blob that is stored once.

    Attributes:
        layer: the first that has it.
        name: of the attribute there.
        lr_mult: by which the solver's rate is multiplied; at 0 it has no gradient.
        decay_mult: by which its weight decay is.
        also: other layers that have it, with their attributes.
    """

    layer: Layer
    name: str
    lr_mult: float | None
    decay_mult: float | None
    also: list[tuple[Layer, str]]

    @property
    def tensor(self) -> Tensor:
        return getattr(self.layer, self.name)


class Sharing:
    """Collects the blobs of layers, in order."""

    def __init__(self) -> None:
        self._blobs: list[Blob] = []
        self._named: dict[str, Blob] = {}

    def add(self, layer: Layer) -> None:
        """Adds a layer's blobs.

        Raises:
            ValueError: it shares one that does not fit.
        """
        params = list(layer.spec.param)
        if len(params) > len(layer.blob_names):
            raise ValueError(
                f"it has {len(params)} param, but only {len(layer.blob_names)} blobs: leave some "
                "out"
            )
        for number, name in enumerate(layer.blob_names):
            param = params[number] if number < len(params) else Message("ParamSpec")
            rates = [
                getattr(param, one) if param.has(one) else None for one in ("lr_mult", "decay_mult")
            ]
            owner = self._named.get(param.name) if param.name else None
            if owner is None:
                blob = Blob(layer, name, rates[0], rates[1], [])
                self._blobs.append(blob)
                if param.name:
                    self._named[param.name] = blob
            else:
                _join(owner, layer, name, param)

    def fill(self, generator: torch.Generator, *, all_learn: bool = False) -> list[Blob]:
        """Gives every blob its memory and first values, and shares what is shared.

        Args:
            generator: of random numbers.
            all_learn: whether those with an ``lr_mult`` of 0 have gradients, too.
        """
        for blob in self._blobs:
            blob.lr_mult = 1.0 if blob.lr_mult is None else blob.lr_mult
            blob.decay_mult = 1.0 if blob.decay_mult is None else blob.decay_mult
            blob.layer.fill(blob.name, generator)
            tensor = blob.tensor
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(blob.lr_mult != 0 or all_learn)
            for layer, name in blob.also:
                if getattr(layer, name).shape == tensor.shape:
                    setattr(layer, name, tensor)
                else:
                    layer.look_at(name, blob.layer, blob.name)
        return self._blobs


def _join(owner: Blob, layer: Layer, name: str, param: Message) -> None:
    own, other = list(owner.tensor.shape), list(getattr(layer, name).shape)
    what = f"it cannot share {param.name!r} with layer {owner.layer.spec.name!r}"
    if param.share_mode == "PERMISSIVE":
        if count(own) != count(other):
            raise ValueError(
                f"{what}: the shapes are {other} here and {own} there, which hold "
                f"{count(other)} and {count(own)} values"
            )
    elif own != other:
        why = "if equally many values are enough, say share_mode: PERMISSIVE here"
        raise ValueError(f"{what}: the shapes are {other} here and {own} there; {why}")
    for field in ("lr_mult", "decay_mult"):
        if not param.has(field):
            continue
        value, old = getattr(param, field), getattr(owner, field)
        if old is not None and old != value:
            raise ValueError(f"{what}: {field} is {value:g} here and {old:g} there")
        setattr(owner, field, value)
    owner.also.append((layer, name))
