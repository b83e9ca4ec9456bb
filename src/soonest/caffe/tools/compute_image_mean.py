"""``compute_image_mean``: the mean of all images of a data base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from soonest.caffe.data.images import decoded
from soonest.caffe.data.stores import opened
from soonest.caffe.io.blobs import Array
from soonest.caffe.io.log import Say
from soonest.caffe.io.weights import write_message
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message
from soonest.caffe.tools.progress import tracked

TOLD = 10_000
"""After how many records a line says so."""


def compute(source: str, target: str, backend: str, *, say: Say) -> Array:
    """The mean image.

    Args:
        source: the data base.
        target: a file to write it to, or "".
        backend: of the data base, ``lmdb`` or ``leveldb``.
        say: what log lines go to.

    Raises:
        ValueError: the data base cannot be read, images differ in size, or it cannot be written.
    """
    total: Array | None = None
    count = 0
    say("Starting iteration")
    for image in tracked(_images(source, backend), "Adding"):
        total = np.zeros(image.shape, np.float32) if total is None else total
        if image.shape != total.shape:
            raise ValueError(
                f"record {count} of {source} has the shape {list(image.shape)}, those before "
                f"{list(total.shape)}: a mean needs images of one size"
            )
        total += image  # In float32 and one by one, as Caffe does.
        count += 1
        if count % TOLD == 0:
            say(f"Processed {count} files.")
    assert total is not None
    if count % TOLD:
        say(f"Processed {count} files.")
    mean = total / np.float32(count)
    channels, height, width = mean.shape
    if target:
        say(f"Write to {target}")
        blob = Message(
            "BlobProto", num=1, channels=channels, height=height, width=width, data=mean.reshape(-1)
        )
        write_message(target, blob)
    say(f"Number of channels: {channels}")
    for number, channel in enumerate(mean.reshape(channels, -1)):
        value = np.add.accumulate(channel)[-1] / np.float32(channel.size)
        say(f"mean_value channel [{number}]: {value:g}")
    return mean


def _images(source: str, backend: str) -> Iterator[Any]:
    what = f"a record of {source}"
    for record in opened(source, backend.upper()).values():
        datum = wire.decode(record, "Datum", file=what)
        if datum.encoded:
            yield decoded(datum.data, what, color=None)
            continue
        shape = (datum.channels, datum.height, datum.width)
        if datum.has("data"):
            values: Any = np.frombuffer(datum.data, np.uint8)
        else:
            values = np.asarray(datum.float_data, np.float32)
        if values.size != np.prod(shape):
            raise ValueError(
                f"{what} has {values.size} values, but its shape is {list(shape)}: the data base "
                "is damaged"
            )
        yield values.reshape(shape)
