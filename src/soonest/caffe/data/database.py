"""Data: records in a data base, as Caffe's tools make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from soonest.caffe.data.images import decoded
from soonest.caffe.data.records import RecordLayer
from soonest.caffe.data.stores import opened
from soonest.caffe.data.transform import Transform
from soonest.caffe.layers.base import Shape
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message


class Data(RecordLayer):
    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self._transform = Transform(spec.transform_param, phase, self.random)
        self._store = opened(self.own().source, self.own().backend)

    def own(self) -> Message:
        return self.spec.data_param

    def records(self) -> Iterator[bytes]:
        while True:
            yield from self._store.values()

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
