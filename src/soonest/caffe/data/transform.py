"""What is done to every image: mean, scale, crop, mirror."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from soonest.caffe.io.blobs import Array, read_array
from soonest.caffe.proto.message import Message


class Transform:
    """Makes images of a data base into what a net reads.

    Args:
        spec: a ``TransformationParameter``.
        phase: in ``TRAIN`` crops are anywhere and mirroring is at random; in ``TEST`` crops are in
            the middle.
        random: for both.

    Raises:
        ValueError: it asks for what cannot be.
    """

    def __init__(self, spec: Message, phase: str, random: np.random.Generator) -> None:
        self._spec = spec
        self._train = phase == "TRAIN"
        self._random = random
        self._mean: Array | None = None
        if spec.has("mean_file"):
            if spec.has("mean_value"):
                raise ValueError("it has both mean_file and mean_value: give one")
            self._mean = read_mean(spec.mean_file)
        elif spec.has("mean_value"):
            self._mean = np.asarray(spec.mean_value, dtype=np.float32).reshape(-1, 1, 1)

    def shape(self, image: tuple[int, ...]) -> tuple[int, int, int]:
        """What an image of a shape (channels, height, width) becomes.

        Raises:
            ValueError: the crop is larger, or the mean does not fit.
        """
        channels, height, width = image
        crop = self._spec.crop_size
        if crop > min(height, width):
            raise ValueError(f"its crop_size {crop} is larger than an image of {height} x {width}")
        mean = self._mean
        if mean is not None:
            per_pixel = self._spec.has("mean_file")
            if per_pixel and mean.shape != image:
                raise ValueError(
                    f"its mean_file has the shape {list(mean.shape)}, an image {list(image)}"
                )
            if not per_pixel and len(mean) not in (1, channels):
                raise ValueError(
                    f"it has {len(mean)} mean_value for {channels} channels: give one, or one each"
                )
        return channels, crop or height, crop or width

    def batch(self, images: Sequence[Any]) -> Array:
        """Images as one array (number, channels, height, width) of float32.

        Raises:
            ValueError: they have several shapes, or one does not fit.
        """
        size = self.shape(images[0].shape)
        out = np.empty((len(images), *size), dtype=np.float32)
        for place, image in zip(out, images, strict=True):
            if image.shape != images[0].shape and self.shape(image.shape) != size:
                raise ValueError(
                    f"images have the shapes {list(images[0].shape)} and {list(image.shape)}: "
                    "without crop_size all must have the same"
                )
            self._one(image, place)
        if self._spec.scale != 1:
            out *= np.float32(self._spec.scale)
        return out

    def _one(self, image: Any, out: Array) -> None:
        mean = self._mean
        crop = self._spec.crop_size
        if crop:
            spare = [image.shape[axis] - crop for axis in (1, 2)]
            if self._train:
                top, left = (int(self._random.integers(one + 1)) for one in spare)
            else:
                top, left = (one // 2 for one in spare)
            image = image[:, top : top + crop, left : left + crop]
            if mean is not None and mean.shape[1] > 1:
                mean = mean[:, top : top + crop, left : left + crop]
        # Caffe mirrors at random in both phases.
        mirrored = self._spec.mirror and self._random.integers(2) == 1
        target = out[:, :, ::-1] if mirrored else out
        if mean is None:
            target[...] = image
        else:
            np.subtract(image, mean, out=target, dtype=np.float32)


def read_mean(path: str) -> Array:
    """The mean image in a ``.binaryproto`` file, as (channels, height, width).

    Raises:
        ValueError: it cannot be read.
    """
    array = read_array(path, "a mean image")
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3:
        raise ValueError(f"{path} has the shape {list(array.shape)}: it is no mean image")
    return array
