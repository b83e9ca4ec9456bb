"""Images in files and in compressed records; needs OpenCV, as Caffe does, for the same pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from soonest.caffe.data.records import RecordLayer
from soonest.caffe.data.transform import Transform
from soonest.caffe.files import read_bytes
from soonest.caffe.io import log
from soonest.caffe.layers.base import Shape
from soonest.caffe.proto.message import Message

_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_WARNED: set[str] = set()
"""Of which images it was said already that they are cut off."""


def decoded(data: bytes, what: str, *, color: bool | None, size: tuple[int, int] = (0, 0)) -> Any:
    """A compressed image as (channels, height, width), blue first.

    Args:
        data: of the file.
        what: it is, for errors.
        color: whether it is to have three channels or one; None to leave that as it is.
        size: height and width to bring it to; zeros to leave it.

    Raises:
        ValueError: it is no image.
    """
    image = _read(data, color)
    if image is None and data.startswith(_JPEG):
        # One that is cut off; with an end OpenCV reads what there is, as it does from a file.
        image = _read(data + _JPEG_END, color)
        if image is not None and what not in _WARNED:
            _WARNED.add(what)
            log.warning(f"{what} is cut off at its end: what is missing is made up")
    if image is None:
        raise ValueError(f"{what} is no image that OpenCV can read")
    if all(size):
        image = resized(image, *size)
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def _read(data: bytes, color: bool | None) -> Any:
    cv2 = _library()
    flags = {None: cv2.IMREAD_UNCHANGED, True: cv2.IMREAD_COLOR, False: cv2.IMREAD_GRAYSCALE}
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags[color]) if data else None


def resized(image: Any, height: int, width: int, *, order: int = 1) -> Any:
    """An image of rows, columns, and perhaps channels, brought to another size.

    Args:
        image: to resize.
        height: of the new one.
        width: of the new one.
        order: 0 takes the nearest pixel, 1 goes linearly between pixels, 3 is cubic.
    """
    cv2 = _library()
    ways = {0: cv2.INTER_NEAREST, 1: cv2.INTER_LINEAR, 3: cv2.INTER_CUBIC}
    if order not in ways:
        raise ValueError(f"no interpolation of order {order} exists: take 0, 1 or 3")
    return cv2.resize(image, (width, height), interpolation=ways[order])


class ImageData(RecordLayer):
    """Images named in a list, each with its label."""

    tops = (2, 2)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = self.own()
        if (own.new_height == 0) != (own.new_width == 0):
            raise ValueError("give both new_height and new_width, or none")
        self._transform = Transform(spec.transform_param, phase, self.random)
        self._lines = [(name.lstrip(), label) for name, label in listed(own.source)]
        if not self._lines:
            raise ValueError(f"{own.source} lists no images")

    def own(self) -> Message:
        return self.spec.image_data_param

    def records(self) -> Iterator[tuple[str, int]]:
        order = np.arange(len(self._lines))
        # Every rank shuffles alike, so that none reads what another does.
        random = np.random.default_rng(0)
        first = int(random.integers(self.own().rand_skip)) if self.own().rand_skip else 0
        while True:
            if self.own().shuffle:
                random.shuffle(order)
            for place in order[first:]:
                yield self._lines[place]
            first = 0

    def _image(self, name: str) -> npt.NDArray[np.uint8]:
        own = self.own()
        path = own.root_folder + name
        data = read_bytes(path, "an image")
        return decoded(data, path, color=own.is_color, size=(own.new_height, own.new_width))

    def shapes(self) -> list[Shape]:
        image = self._image(self._lines[0][0])
        return [(self.batch_size, *self._transform.shape(image.shape)), (self.batch_size,)]

    def batch(self, records: Sequence[tuple[str, int]]) -> list[Any]:
        images = [self._image(name) for name, _ in records]
        return [self._transform.batch(images), np.array([x for _, x in records], np.float32)]


def listed(source: str) -> list[tuple[str, int]]:
    """Names and labels, from a file with one of each in a line; a name may have spaces in it."""
    found: list[tuple[str, int]] = []
    text = read_bytes(source, "a list of images").decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        name, _, label = line.rstrip().rpartition(" ")
        if not line.strip():
            continue
        try:
            found.append((name, int(label)))
        except ValueError:
            raise ValueError(f"{source}:{number}: a line is a path, a space, a label") from None
    return found


def _library() -> Any:
    try:
        import cv2
    except ImportError:
        raise ValueError("images need OpenCV: pip install 'soonest[caffe]'") from None
    return cv2
