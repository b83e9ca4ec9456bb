"""HDF5Data: rows of the datasets in HDF5 files, named in a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from soonest.caffe.data.records import RecordLayer
from soonest.caffe.files import read_bytes
from soonest.caffe.io import hdf5
from soonest.caffe.layers.base import MANY, Shape
from soonest.caffe.proto.message import Message


class HDF5Data(RecordLayer):
    tops = (1, MANY)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        if spec.has("transform_param"):
            raise ValueError("it cannot transform its data: leave transform_param out")
        source = self.own().source
        listed = read_bytes(source, "a list of HDF5 files").decode("utf-8", "surrogateescape")
        self._files = listed.split()
        if not self._files:
            raise ValueError(f"{source} lists no files")

    def own(self) -> Message:
        return self.spec.hdf5_data_param

    def _table(self, path: str) -> list[Any]:
        """What a file has for each top, with as many rows each."""
        with hdf5.open_to_read(path, "a table") as file:
            missing = [name for name in self.spec.top if name not in file]
            if missing:
                raise ValueError(f"{path} has no dataset {missing[0]!r}, which its top asks for")
            table = [hdf5.values(file[name], f"{path}, {name!r}") for name in self.spec.top]
        rows = {len(array) if array.ndim else 0 for array in table}
        if len(rows) != 1 or 0 in rows:
            raise ValueError(f"{path}: its datasets must have equally many rows, and at least one")
        return table

    def records(self) -> Iterator[list[Any]]:
        random = np.random.default_rng(0)  # The same on every rank.
        files = list(self._files)
        first: tuple[str, list[Shape]] | None = None
        while True:
            if self.own().shuffle:
                random.shuffle(files)
            for path in files:
                table = self._table(path)
                shapes = [array.shape[1:] for array in table]
                first = first or (path, shapes)
                if shapes != first[1]:
                    raise ValueError(
                        f"rows of {path} have the shapes {[list(one) for one in shapes]}, but "
                        f"those of {first[0]} {[list(one) for one in first[1]]}: all files must "
                        "agree"
                    )
                order = np.arange(len(table[0]))
                if self.own().shuffle:
                    random.shuffle(order)
                for row in order:
                    yield [array[row] for array in table]

    def shapes(self) -> list[Shape]:
        return [(self.batch_size, *array.shape[1:]) for array in self._table(self._files[0])]

    def batch(self, records: Sequence[list[Any]]) -> list[Any]:
        return [np.stack(column) for column in zip(*records, strict=True)]
