"""Data: records in an LMDB data base, as Caffe's tools make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from soonest.caffe import wire
from soonest.caffe.data.images import decoded
from soonest.caffe.data.records import RecordLayer
from soonest.caffe.data.transform import Transform
from soonest.caffe.layers.base import Shape
from soonest.caffe.message import Message


class Data(RecordLayer):
    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        if self.own().backend != "LMDB":
            raise ValueError("its backend is LEVELDB, Caffe's default, but only LMDB is supported")
        self._transform = Transform(spec.transform_param, phase, self.random)
        self._base = _opened(self.own().source)

    def own(self) -> Message:
        return self.spec.data_param

    def records(self) -> Iterator[bytes]:
        while True:
            with self._base.begin() as transaction:
                yield from transaction.cursor().iternext(keys=False, values=True)

    def _image(self, record: bytes) -> tuple[Any, int]:
        datum = wire.decode(record, "Datum", file=f"a record of {self.own().source}")
        if datum.encoded:
            force = self.spec.transform_param
            if force.force_color and force.force_gray:
                raise ValueError("it has both force_color and force_gray: give one")
            color = True if force.force_color or self.own().force_encoded_color else None
            color = False if force.force_gray else color
            return decoded(datum.data, "a record", color=color), datum.label
        shape = (datum.channels, datum.height, datum.width)
        if datum.has("data"):
            values: Any = np.frombuffer(datum.data, np.uint8)
        else:
            values = np.asarray(datum.float_data, np.float32)
        if min(shape) < 1 or len(values) != shape[0] * shape[1] * shape[2]:
            raise ValueError(
                f"a record of {self.own().source} has {len(values)} values, but its shape is "
                f"{list(shape)}: the data base is damaged"
            )
        return values.reshape(shape), datum.label

    def shapes(self) -> list[Shape]:
        image, _ = self._image(next(self.records()))
        found: list[Shape] = [(self.batch_size, *self._transform.shape(image.shape))]
        return [*found, (self.batch_size,)][: len(self.spec.top)]

    def batch(self, records: Sequence[bytes]) -> list[Any]:
        images, labels = zip(*(self._image(record) for record in records), strict=True)
        found = [self._transform.batch(images), np.array(labels, dtype=np.float32)]
        return found[: len(self.spec.top)]


_OPEN: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""Those in use, by path: a process may open each only once."""


def _opened(source: str) -> Any:
    """A data base, for reading, without the lock file that another might hold."""
    try:
        import lmdb
    except ImportError:
        raise ValueError("data bases need lmdb: pip install 'soonest[caffe]'") from None
    path = Path(source).resolve()
    if str(path) in _OPEN:
        return _OPEN[str(path)]
    if not path.exists():
        raise ValueError(
            f"there is no data base {source}; paths are relative to the folder in which the "
            f"command runs, {Path.cwd()}"
        )
    try:
        base = lmdb.open(source, readonly=True, lock=False, readahead=False, subdir=path.is_dir())
        with base.begin() as transaction:
            entries = transaction.stat()["entries"]
        file = path / "data.mdb" if path.is_dir() else path
        missing = (base.info()["last_pgno"] + 1) * base.stat()["psize"] - file.stat().st_size
    except lmdb.Error as error:
        raise ValueError(f"cannot read {source} as an LMDB data base: {error}") from None
    if missing > 0:  # To read beyond the end would be the end of the process.
        raise ValueError(f"the data base {source} is cut off: {missing} bytes of it are missing")
    if not entries:
        raise ValueError(f"the data base {source} has no records")
    _OPEN[str(path)] = base
    return base
