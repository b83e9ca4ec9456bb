"""HDF5Output: what a net computes, as a file."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from soonest.caffe.io import hdf5
from soonest.caffe.layers.base import Layer, Shape
from soonest.caffe.proto.message import Message

_NAMES = ("data", "label")


class HDF5Output(Layer):
    """Writes its two bottoms as datasets ``data`` and ``label`` of four axes.

    The items of all passes follow one after the other. Of several ranks only the first writes.
    """

    bottoms = (2, 2)
    tops = (0, 0)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self.file = spec.hdf5_output_param.file_name
        if not self.file:
            raise ValueError("give a file_name")
        self._begun = False
        self._writes = True

    def share(self, rank: int, ranks: int, *, divide: bool = False) -> None:
        self._writes = rank == 0

    def forward(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        for bottom, name in zip(bottoms, _NAMES, strict=True):
            if not 1 <= bottom.dim() <= 4:
                raise ValueError(f"its {name} must have 1 to 4 axes, not {list(bottom.shape)}")
        if len(bottoms[0]) != len(bottoms[1]):
            raise ValueError(f"it has {len(bottoms[0])} data and {len(bottoms[1])} labels")
        if self._writes and not bottoms[0].is_meta:
            arrays = [
                bottom.detach().cpu().numpy().reshape(*bottom.shape, *(1,) * (4 - bottom.dim()))
                for bottom in bottoms
            ]
            hdf5.append(self.file, dict(zip(_NAMES, arrays, strict=True)), new=not self._begun)
            self._begun = True
        return ()
