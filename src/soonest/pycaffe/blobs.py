"""Blobs as scripts see them: arrays that are views, of what layers give and of what they learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from soonest.caffe.io.blobs import Array
from soonest.caffe.layers.base import Layer
from soonest.caffe.layers.python import ArrayBlob
from soonest.caffe.net.step import Step


class NetBlob(ArrayBlob):
    """What is between layers. Its arrays stay the same as long as its shape does.

    A solver leaves tensors here while it trains; they are copied when someone looks.
    """

    _last: Tensor | None = None
    _first: Tensor | None = None

    @property
    def data(self) -> Array:
        if self._last is not None:
            last, self._last = self._last, None
            self.take(last)
        return self._data

    @property
    def diff(self) -> Array:
        self.data  # noqa: B018 - Its shape may be another by now.
        if self._diff is None:
            self._diff = np.zeros(self._data.shape, np.float32)
        if self._first is not None and self._first.grad is not None:
            np.copyto(self._diff, self._first.grad.numpy())
            self._first = None
        return self._diff

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def take(self, values: Tensor) -> None:
        """Copies what a layer has given."""
        array = values.detach().numpy()
        if array.shape != self._data.shape:
            self.reshape(*array.shape)
        np.copyto(self._data, array)

    def take_diff(self, values: Tensor) -> None:
        """Copies a gradient."""
        np.copyto(self.diff, values.detach().numpy())

    def see(self, values: Tensor, *, anew: bool) -> None:
        """Remembers what a layer has given while a solver trains.

        Args:
            values: what it gave.
            anew: whether it is not in place, so that its gradient is the blob's.
        """
        self._last = values
        if anew:
            self._first = values


class ParamBlob(ArrayBlob):
    """What a layer learns, seen in the layer itself.

    Args:
        layer: which has it.
        name: of its attribute.
    """

    def __init__(self, layer: Layer, name: str) -> None:
        self._layer, self._name = layer, name

    @property
    def _tensor(self) -> Any:
        return getattr(self._layer, self._name)

    @property
    def data(self) -> Array:
        return self._tensor.detach().numpy()

    @property
    def diff(self) -> Array:
        tensor = self._tensor
        owner = tensor if tensor.is_leaf or tensor._base is None else tensor._base
        if owner.grad is None:
            owner.grad = torch.zeros_like(owner)
        return owner.grad.view(tensor.shape).numpy()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    @property
    def count(self) -> int:
        return self._tensor.numel()

    def reshape(self, *shape: int) -> None:
        if tuple(shape) != self.shape:
            raise ValueError(
                f"what a layer learns has the shape {list(self.shape)}, which its definition says: "
                "change that, or write into .data"
            )


class LayerView:
    """A layer of a net.

    Attributes:
        type: as in prototxt.
        blobs: what it learns.
    """

    def __init__(self, step: Step) -> None:
        self.type: str = step.layer.spec.type
        self.blobs = [ParamBlob(step.layer, name) for name in step.layer.blob_names]
