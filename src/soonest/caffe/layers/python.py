"""Layers that a program defines in Python, over NumPy arrays, as with pycaffe."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from soonest.caffe.io.blobs import Array
from soonest.caffe.layers.base import MANY, Layer, Shape
from soonest.caffe.proto.message import Message

_PHASES = ("TRAIN", "TEST")


class ArrayBlob:
    """Values and their gradient as arrays that may be written in place."""

    def __init__(self, shape: Sequence[int] = ()) -> None:
        self._data = np.zeros(shape, np.float32)
        self._diff: Array | None = None

    @property
    def data(self) -> Array:
        return self._data

    @property
    def diff(self) -> Array:
        """Made when it is first asked for."""
        if self._diff is None:
            self._diff = np.zeros(self._data.shape, np.float32)
        return self._diff

    @property
    def shape(self) -> Shape:
        return self._data.shape

    @property
    def count(self) -> int:
        return self._data.size

    @property
    def num(self) -> int:
        return self._old_axis(0)

    @property
    def channels(self) -> int:
        return self._old_axis(1)

    @property
    def height(self) -> int:
        return self._old_axis(2)

    @property
    def width(self) -> int:
        return self._old_axis(3)

    def _old_axis(self, axis: int) -> int:
        """Blobs once had four axes."""
        return self.shape[axis] if axis < len(self.shape) else 1

    def reshape(self, *shape: int) -> None:
        """Gives it another shape; values stay where there are as many as before."""
        if tuple(shape) == self.shape:
            return
        new = np.zeros(shape, np.float32)
        if new.size == self.count:
            new.flat[:] = self._data.flat
        self._data, self._diff = new, None

    def look_at(self, data: Array, diff: Array | None = None) -> None:
        """Makes arrays that another has its own."""
        self._data, self._diff = data, diff


class ArrayBlobs(list[ArrayBlob]):
    """What a layer learns."""

    def add_blob(self, *shape: int) -> ArrayBlob:
        """Adds one of zeros and returns it."""
        self.append(ArrayBlob(shape))
        return self[-1]


class PythonLayer:
    """What a layer written in Python derives from: pycaffe's ``caffe.Layer``.

    Attributes:
        param_str: what the net says of it.
        phase: 0 while training, 1 while testing.
        blobs: what it learns; ``setup`` may add some.
    """

    def __init__(self, spec: Message) -> None:
        self.param_str: str = spec.python_param.param_str
        self.phase = _PHASES.index(spec.phase)
        self.blobs = ArrayBlobs()

    def setup(self, bottom: list[ArrayBlob], top: list[ArrayBlob]) -> None:
        """Called once."""

    def reshape(self, bottom: list[ArrayBlob], top: list[ArrayBlob]) -> None:
        """Gives the tops their shapes, before every pass."""

    def forward(self, bottom: list[ArrayBlob], top: list[ArrayBlob]) -> None:
        """Writes ``top[i].data``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(
        self, top: list[ArrayBlob], propagate_down: list[bool], bottom: list[ArrayBlob]
    ) -> None:
        """Writes ``bottom[i].diff`` where ``propagate_down[i]``, and the diffs of its blobs."""
        raise NotImplementedError(f"{type(self).__name__} has no backward")


class Python(Layer):
    """A layer of a class that a module of the user's has."""

    bottoms = (0, MANY)
    tops = (0, MANY)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = _class(spec.python_param)
        if not spec.has("phase"):
            spec = _in_phase(spec, phase)
        self.user = own(spec)
        self._bottom = [ArrayBlob(shape) for shape in shapes]
        # One that is written in place is one blob, as in Caffe.
        names = list(spec.bottom)
        self._top = [
            self._bottom[names.index(name)] if name in names else ArrayBlob() for name in spec.top
        ]
        self.user.setup(self._bottom, self._top)
        self.user.reshape(self._bottom, self._top)
        for number, blob in enumerate(self.user.blobs):
            self.add_blob(f"blob{number}", blob.shape, Message("FillerParameter"))

    def fill(self, name: str, generator: torch.Generator) -> None:
        """They start as the user's ``setup`` has left them."""
        blob = self.user.blobs[self.blob_names.index(name)]
        setattr(self, name, nn.Parameter(torch.from_numpy(blob.data.copy())))

    def infer(self, *bottoms: Tensor) -> list[Tensor]:
        return [torch.empty(blob.shape, device="meta") for blob in self._top]

    def forward(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        return _Passed.apply(self, *bottoms, *self.blobs())

    def run(self, bottoms: Sequence[Tensor], blobs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Calls the user's methods for a pass."""
        self._see(bottoms, blobs)
        self.user.reshape(self._bottom, self._top)
        self.user.forward(self._bottom, self._top)
        return tuple(torch.from_numpy(blob.data.copy()) for blob in self._top)

    def run_back(
        self,
        bottoms: Sequence[Tensor],
        blobs: Sequence[Tensor],
        tops: Sequence[Tensor],
        sent: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Calls the user's method for a pass back, and returns the gradients."""
        self._see(bottoms, blobs)
        for blob, top, gradient in zip(self._top, tops, sent, strict=True):
            blob.look_at(top.numpy().copy(), gradient.numpy().copy())
        self.user.backward(self._top, list(needed[: len(bottoms)]), self._bottom)
        return [
            torch.from_numpy(blob.diff.copy()) if wanted else None
            for blob, wanted in zip([*self._bottom, *self.user.blobs], needed, strict=True)
        ]

    def _see(self, bottoms: Sequence[Tensor], blobs: Sequence[Tensor]) -> None:
        """Lets the user's arrays be views of tensors, or copies of what is written in place."""
        for blob, tensor in zip(self._bottom, bottoms, strict=True):
            array = tensor.detach().numpy()
            blob.look_at(array.copy() if blob in self._top else array)
        for blob, tensor in zip(self.user.blobs, blobs, strict=True):
            blob.look_at(tensor.detach().numpy())


class _Passed(torch.autograd.Function):
    """A pass through a user's layer, and back."""

    @staticmethod
    def forward(ctx: Any, layer: Python, *given: Tensor) -> tuple[Tensor, ...]:
        count = len(given) - len(layer.blob_names)
        tops = layer.run(given[:count], given[count:])
        ctx.layer, ctx.count = layer, count
        ctx.save_for_backward(*given, *tops)
        return tops

    @staticmethod
    def backward(ctx: Any, *sent: Tensor) -> tuple[Any, ...]:
        stored, last = ctx.saved_tensors, ctx.count + len(ctx.layer.blob_names)
        return None, *ctx.layer.run_back(
            stored[: ctx.count],
            stored[ctx.count : last],
            stored[last:],
            sent,
            ctx.needs_input_grad[1:],
        )


def _class(own: Message) -> type[PythonLayer]:
    """The class that a layer names.

    Raises:
        ValueError: there is none.
    """
    if not own.module or not own.layer:
        raise ValueError("give the module and the layer, its class, in python_param")
    _offer_pycaffe()
    if os.getcwd() not in sys.path:  # Behind all that PYTHONPATH says.
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(own.module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"there is no module {error.name!r}: put its folder into PYTHONPATH, or run the "
            "command there"
        ) from None
    found = getattr(module, own.layer, None)
    if not isinstance(found, type) or not issubclass(found, PythonLayer):
        raise ValueError(
            f"module {own.module!r} has no class {own.layer!r} derived from caffe.Layer"
        )
    return found


def _offer_pycaffe() -> None:
    """Lets modules of layers say ``import caffe``."""
    if "caffe" not in sys.modules:
        # Not at the top, as it is made of nets and so of layers.
        importlib.import_module("soonest.pycaffe.alias").provide()


def _in_phase(spec: Message, phase: str) -> Message:
    new = Message(spec.schema)
    new.line = spec.line
    new.values.update(spec.values)
    new.phase = phase
    return new
