"""Layers that read records: what they have in common, and how ranks share records out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soonest.caffe.data.ahead import Ahead
from soonest.caffe.layers.base import Layer, Shape
from soonest.caffe.proto.message import Message


class RecordLayer(Layer):
    """Reads records without end, a batch at a time.

    While training, rank r of n reads the records r, r + n, r + 2n, … of the stream; a test reads
    all.
    """

    bottoms = (0, 0)
    tops = (1, 2)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self.batch_size = self.own().batch_size
        self._rank, self._ranks = 0, 1
        self._batches: Ahead[list[Any]] | None = None
        self.random = np.random.default_rng(int(torch.randint(2**31, (), device="cpu")))
        if self.batch_size < 1:
            raise ValueError("give a batch_size above 0")

    def own(self) -> Message:
        """The message with the settings of this type of layer."""
        raise NotImplementedError

    def records(self) -> Iterator[Any]:
        """All records, again and again, from the first on; what is not needed is not decoded."""
        raise NotImplementedError

    def shapes(self) -> list[Shape]:
        """Of the tops, as one record shows."""
        raise NotImplementedError

    def batch(self, records: Sequence[Any]) -> list[Any]:
        """Arrays, one per top, of these records."""
        raise NotImplementedError

    def share(self, rank: int, ranks: int, *, divide: bool = False) -> None:
        """While training, several ranks share out the records."""
        if self.phase != "TRAIN":
            return
        if divide:
            if self.batch_size % ranks:
                raise ValueError(
                    f"its batch_size {self.batch_size} cannot be divided by {ranks} ranks: "
                    "change one, or leave --global-batch out"
                )
            self.batch_size //= ranks
        self._rank, self._ranks = rank, ranks

    def infer(self, *bottoms: Tensor) -> list[Tensor]:
        return [torch.empty(shape, device="meta") for shape in self.shapes()]

    def forward(self) -> list[Tensor]:
        if self._batches is None:
            # Of layers of every type that reads ahead this field says how far.
            self._batches = Ahead(self.batches(), self.spec.data_param.prefetch)
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in next(self._batches)]

    def close(self) -> None:
        """Stops reading ahead; the next pass reads from the first record again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def batches(self) -> Iterator[list[Any]]:
        """Without end, those of this rank."""
        mine = itertools.islice(self.records(), self._rank, None, self._ranks)
        while True:
            yield self.batch(list(itertools.islice(mine, self.batch_size)))
