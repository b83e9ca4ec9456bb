"""``convert_imageset``: makes a data base of the images in a list."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from soonest.caffe.data.images import decoded, listed
from soonest.caffe.files import read_bytes
from soonest.caffe.io.log import Say
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message
from soonest.caffe.tools.progress import tracked
from soonest.caffe.tools.store import created

TOGETHER = 1000
"""Records that are written at once."""
_SAME = {"jpeg": "jpg"}


@dataclass(frozen=True)
class Settings:
    """What is done to images.

    Attributes:
        gray: whether they get one channel, else three.
        shuffle: whether their order is left to chance.
        size: height and width to bring them to; zeros to leave them.
        check_size: whether all must have one size.
        encoded: whether they are stored compressed.
        encode_type: as what; "" for what they are.
        backend: of the data base, ``lmdb`` or ``leveldb``.
    """

    gray: bool = False
    shuffle: bool = False
    size: tuple[int, int] = (0, 0)
    check_size: bool = False
    encoded: bool = False
    encode_type: str = ""
    backend: str = "lmdb"


def convert(root: str, source: str, target: str, settings: Settings, *, say: Say) -> None:
    """Makes a data base.

    Args:
        root: what stands before the names in the list.
        source: the list: a name and a label in each line.
        target: the new data base.
        settings: what is done to images.
        say: what log lines go to.

    Raises:
        ValueError: the list cannot be read, or the data base not be written.
    """
    lines = listed(source)
    if settings.shuffle:
        say("Shuffling data")
        random.shuffle(lines)
    say(f"A total of {len(lines)} images.")
    if settings.encode_type and not settings.encoded:
        say("encode_type specified, assuming encoded=true.")
    count = 0
    values: int | None = None
    with created(target, settings.backend) as base:
        for number, (name, label) in enumerate(tracked(lines, "Converting", len(lines))):
            datum = datum_of(root + name, settings)
            if datum is None:
                say(f"Could not open or find file {root}{name}")
                continue
            if settings.check_size:
                values = len(datum.data) if values is None else values
                if len(datum.data) != values:
                    raise ValueError(
                        f"{root}{name} has {len(datum.data)} values, those before {values}: give "
                        "--resize_height and --resize_width, or leave --check_size out"
                    )
            datum.label = label
            base.put(f"{number:08d}_{name}".encode("utf-8", "surrogateescape"), wire.encode(datum))
            count += 1
            if count % TOGETHER == 0:
                base.commit()
                say(f"Processed {count} files.")
    if count % TOGETHER:
        say(f"Processed {count} files.")


def datum_of(path: str, settings: Settings) -> Message | None:
    """An image as a record; None if it cannot be read."""
    try:
        data = read_bytes(path, "an image")
        image = decoded(data, path, color=not settings.gray, size=settings.size)
    except ValueError:
        return None
    if not settings.encoded and not settings.encode_type:
        channels, height, width = image.shape
        return Message(
            "Datum", channels=channels, height=height, width=width,
            data=np.ascontiguousarray(image).tobytes(), encoded=False,
        )  # fmt: skip
    kind = settings.encode_type or _ending(path)
    as_it_is = not any(settings.size) and _SAME.get(kind, kind) == _SAME.get(
        _ending(path), _ending(path)
    )
    return Message("Datum", data=data if as_it_is else _encoded(image, kind), encoded=True)


def _ending(path: str) -> str:
    return path.rpartition(".")[2].lower()


def _encoded(image: Any, kind: str) -> bytes:
    import cv2

    try:
        done, data = cv2.imencode(f".{kind}", np.ascontiguousarray(image.transpose(1, 2, 0)))
    except cv2.error:
        done, data = False, np.empty(0, np.uint8)
    if not done:
        raise ValueError(f"OpenCV cannot write images of the type {kind!r}: take png or jpg")
    return data.tobytes()
