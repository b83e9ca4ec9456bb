"""WindowData: pieces of images, named in a list, that show something or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from soonest.caffe.data.images import decoded, resized
from soonest.caffe.data.records import RecordLayer
from soonest.caffe.data.transform import read_mean
from soonest.caffe.files import read_bytes
from soonest.caffe.io.blobs import Array
from soonest.caffe.layers.base import Shape
from soonest.caffe.proto.message import Message


class Window(NamedTuple):
    """A piece of an image.

    Attributes:
        path: of the image.
        label: of what it shows; 0 for nothing.
        corners: its first and last column and row: left, top, right, bottom.
    """

    path: str
    label: int
    corners: tuple[int, int, int, int]


class WindowData(RecordLayer):
    """Windows drawn by chance: first those that show nothing, then the wanted share of others.

    Each is cut out, with some of what is around it if that is asked for, and brought to one size.
    """

    tops = (2, 2)

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own, transform = self.own(), spec.transform_param
        self._size, self._scale = transform.crop_size, np.float32(transform.scale)
        if self._size < 1:
            raise ValueError("give a crop_size above 0, to which windows are brought")
        if own.crop_mode not in ("warp", "square"):
            raise ValueError(f"its crop_mode is {own.crop_mode!r}: take warp or square")
        if 2 * own.context_pad >= self._size:
            raise ValueError(f"its context_pad {own.context_pad} leaves nothing of {self._size}")
        self._something, self._nothing, self._channels = _listed(own)
        for number, windows, kind in zip(
            self._wanted(),
            (self._nothing, self._something),
            ("an overlap below bg_threshold", "an overlap of fg_threshold or more"),
            strict=True,
        ):
            if number and not windows:
                raise ValueError(f"{own.source} has no windows with {kind}")
        self._mean = self._read_mean(transform)
        self._files: dict[str, bytes] = {}

    def own(self) -> Message:
        return self.spec.window_data_param

    def _read_mean(self, transform: Message) -> Array | None:
        """What is taken from a window: (channels, size, size), or a number for each channel."""
        if transform.has("mean_file"):
            if transform.has("mean_value"):
                raise ValueError("it has both mean_file and mean_value: give one")
            mean = read_mean(transform.mean_file)
            if mean.shape[0] != self._channels or min(mean.shape[1:]) < self._size:
                raise ValueError(
                    f"its mean_file has the shape {list(mean.shape)}: it must have "
                    f"{self._channels} channels and {self._size} rows and columns or more"
                )
            edge = (mean.shape[2] - self._size) // 2
            return mean[:, edge : edge + self._size, edge : edge + self._size]
        if not transform.has("mean_value"):
            return None
        if len(transform.mean_value) not in (1, self._channels):
            raise ValueError(f"give one mean_value, or {self._channels}: one for each channel")
        values = np.asarray(transform.mean_value, np.float32).reshape(-1, 1, 1)
        return np.broadcast_to(values, (self._channels, self._size, self._size))

    def shapes(self) -> list[Shape]:
        return [(self.batch_size, self._channels, self._size, self._size), (self.batch_size,)]

    def _wanted(self) -> tuple[int, int]:
        """How many windows of a batch show nothing, and something."""
        some = int(np.float32(self.batch_size) * np.float32(self.own().fg_fraction))
        return self.batch_size - some, some

    def records(self) -> Iterator[Window]:
        while True:
            for number, windows in zip(
                self._wanted(), (self._nothing, self._something), strict=True
            ):
                for _ in range(number):
                    yield windows[self.random.integers(len(windows))]

    def batches(self) -> Iterator[list[Any]]:
        """Every rank draws for itself, so each has the wanted share."""
        drawn = self.records()
        while True:
            yield self.batch([next(drawn) for _ in range(self.batch_size)])

    def batch(self, records: Sequence[Window]) -> list[Any]:
        images = np.zeros((len(records), self._channels, self._size, self._size), np.float32)
        for out, window in zip(images, records, strict=True):
            self._cut(window, out)
        return [images, np.array([window.label for window in records], np.float32)]

    def _image(self, path: str) -> Any:
        """Rows, columns, channels."""
        data = self._files.get(path) or read_bytes(path, "an image")
        if self.own().cache_images:
            self._files[path] = data
        image = decoded(data, path, color=True)
        if image.shape[0] != self._channels:
            raise ValueError(
                f"{path} has {image.shape[0]} channels, but {self.own().source} says "
                f"{self._channels}"
            )
        return image.transpose(1, 2, 0)

    def _cut(self, window: Window, out: Array) -> None:
        mirrored = self.spec.transform_param.mirror and self.random.integers(2) == 1
        image = self._image(window.path)
        place = placed(
            window.corners, image.shape[:2], self._size, self.own().context_pad,
            square=self.own().crop_mode == "square",
        )  # fmt: skip
        left, top, right, bottom = place.inside
        if left > right or top > bottom or left < 0 or top < 0:
            raise ValueError(f"a window of {window.path}, {window.corners}, is not in the image")
        piece = resized(image[top : bottom + 1, left : right + 1], place.height, place.width)
        if mirrored:
            piece = piece[:, ::-1]
        column = place.after if mirrored else place.before
        column = min(column, self._size - place.width)
        rows, columns = (slice(place.above, place.above + place.height),
                         slice(column, column + place.width))  # fmt: skip
        values = piece.transpose(2, 0, 1).astype(np.float32)
        if self._mean is not None:
            values -= self._mean[:, rows, columns]
        out[:, rows, columns] = values * self._scale


class Place(NamedTuple):
    """Where a window lies, and where in the result what is cut out goes.

    Attributes:
        inside: corners of what of it is inside of the image.
        height: to which that is brought.
        width: the same.
        above: how many rows of the result are above it.
        before: how many columns are left of it.
        after: how many are right of it, in front when it is mirrored.
    """

    inside: tuple[int, int, int, int]
    height: int
    width: int
    above: int = 0
    before: int = 0
    after: int = 0


def placed(
    corners: tuple[int, int, int, int], image: tuple[int, int], size: int, pad: int, *, square: bool
) -> Place:
    """Where a window goes.

    Args:
        corners: of the window: left, top, right, bottom.
        image: its height and width.
        size: of the result.
        pad: how much of the result, on each side, is to show what is around the window.
        square: whether the window is first widened to a square.
    """
    left, top, right, bottom = corners
    if not pad and not square:
        return Place(corners, size, size)
    single = np.float32  # Caffe computes in single precision.
    widen = single(size) / single(size - 2 * pad)
    half = [single(right - left + 1) / single(2), single(bottom - top + 1) / single(2)]
    middle = [single(left) + half[0], single(top) + half[1]]
    if square:
        half = [max(half)] * 2
    first = [_rounded(at - far * widen) for at, far in zip(middle, half, strict=True)]
    last = [_rounded(at + far * widen) for at, far in zip(middle, half, strict=True)]
    limits = (image[1], image[0])
    before = [max(0, -one) for one in first]
    after = [max(0, one - limit + 1) for one, limit in zip(last, limits, strict=True)]
    scale = [single(size) / single(b - a + 1) for a, b in zip(first, last, strict=True)]
    inside = [(first[axis] + before[axis], last[axis] - after[axis]) for axis in (0, 1)]
    spare_before = [_rounded(before[axis] * scale[axis]) for axis in (0, 1)]
    spare_after = _rounded(after[0] * scale[0])
    sizes = [_rounded((b - a + 1) * scale[axis]) for axis, (a, b) in enumerate(inside)]
    return Place(
        (inside[0][0], inside[1][0], inside[0][1], inside[1][1]),
        min(sizes[1], size - spare_before[1]),
        min(sizes[0], size - spare_before[0]),
        spare_before[1],
        spare_before[0],
        spare_after,
    )


def _rounded(value: Any) -> int:
    """As in C: halves away from zero."""
    value = float(value)
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def _listed(own: Message) -> tuple[list[Window], list[Window], int]:
    """The windows that show something, those that show nothing, and how many channels they have.

    Raises:
        ValueError: the list cannot be read.
    """
    source = own.source
    words = iter(read_bytes(source, "a list of windows").decode("utf-8", "surrogateescape").split())
    something: list[Window] = []
    nothing: list[Window] = []
    channels = 0
    try:
        while (mark := next(words, None)) is not None:
            if mark != "#":
                raise ValueError(mark)
            int(next(words))  # Its number.
            path = own.root_folder + next(words)
            channels, _, _, count = (int(next(words)) for _ in range(4))
            for _ in range(count):
                label, overlap = int(next(words)), float(next(words))
                left, top, right, bottom = (int(next(words)) for _ in range(4))
                corners = (left, top, right, bottom)
                if overlap >= own.fg_threshold:
                    if label < 1:
                        raise ValueError(f"label {label}")
                    something.append(Window(path, label, corners))
                elif overlap < own.bg_threshold:
                    nothing.append(Window(path, 0, corners))
    except (ValueError, StopIteration, RuntimeError) as error:
        raise ValueError(
            f"{source}: {error or 'it ends early'}: an image is # and its number, its path, "
            "channels, height, width and number of windows; a window is label (1 or more if it "
            "shows something), overlap, left, top, right, bottom"
        ) from None
    if not channels:
        raise ValueError(f"{source} lists no images")
    return something, nothing, channels
