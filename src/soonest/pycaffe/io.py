"""pycaffe's ``io``: images, what is done to them before a net reads them, and messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from soonest.caffe.data.images import decoded, resized
from soonest.caffe.files import read_bytes
from soonest.caffe.io.blobs import Array
from soonest.pycaffe.proto import caffe_pb2

Sizes = Sequence[int] | npt.NDArray[Any]


def load_image(filename: str, color: bool = True) -> Array:
    """An image as (height, width, channels) of red, green and blue, or of one, from 0 to 1."""
    image = decoded(read_bytes(filename, "an image"), filename, color=color)
    return image[::-1].transpose(1, 2, 0).astype(np.float32) / 255


def resize_image(im: Array, new_dims: Sizes, interp_order: int = 1) -> Array:
    """An image (height, width, channels) brought to a height and width.

    Args:
        im: the image.
        new_dims: height and width.
        interp_order: 0 takes the nearest pixel, 1 goes linearly between pixels, 3 is cubic.
    """
    height, width = int(new_dims[0]), int(new_dims[1])
    image = np.ascontiguousarray(im, np.float32)
    return resized(image, height, width, order=interp_order).reshape(height, width, im.shape[-1])


def resize(image: Array, output_shape: Sizes, order: int = 1, **_: Any) -> Array:
    """An image brought to a shape (height, width), with or without its channels behind.

    Scripts know it from scikit-image, whose other settings are taken and not used.

    Args:
        image: (height, width), or with channels behind.
        output_shape: what it is to be.
        order: as for ``resize_image``.
    """
    wide = image[..., None] if image.ndim == 2 else image
    if tuple(output_shape[2:]) not in ((), wide.shape[2:]):
        raise ValueError(
            f"an image with {wide.shape[2]} channels cannot be brought to {list(output_shape)}"
        )
    found = resize_image(wide, output_shape[:2], order)
    return found[..., 0] if image.ndim == 2 else found


def oversample(images: Sequence[Array], crop_dims: Sizes) -> Array:
    """Ten cuts of each image: four corners and the middle, and these mirrored.

    Args:
        images: (height, width, channels) each, of one size.
        crop_dims: height and width of a cut.
    """
    height, width = int(crop_dims[0]), int(crop_dims[1])
    down, right = images[0].shape[0] - height, images[0].shape[1] - width
    if min(down, right) < 0:
        raise ValueError(
            f"cuts of {height} x {width} are larger than the images of {images[0].shape[0]} x "
            f"{images[0].shape[1]}"
        )
    starts = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    cuts: list[Array] = []
    for image in images:
        own = [image[top : top + height, left : left + width] for top, left in starts]
        cuts += own + [cut[:, ::-1] for cut in own]
    return np.array(cuts, np.float32)


class Transformer:
    """What is done to an image before a net reads it, per input.

    In this order: the size of the input, transpose, swap of channels, raw scale, mean, input scale.

    Args:
        inputs: the shape of each input.
    """

    def __init__(self, inputs: dict[str, Sequence[int]]) -> None:
        self.inputs = {name: tuple(shape) for name, shape in inputs.items()}
        self.transpose: dict[str, Sequence[int]] = {}
        self.channel_swap: dict[str, Sequence[int]] = {}
        self.raw_scale: dict[str, float] = {}
        self.mean: dict[str, Array] = {}
        self.input_scale: dict[str, float] = {}

    def _check(self, in_: str) -> None:
        if in_ not in self.inputs:
            raise ValueError(f"{in_!r} is no input of the net: it has {sorted(self.inputs)}")

    def preprocess(self, in_: str, data: Array) -> Array:
        """An image (height, width, channels) as the net wants it."""
        self._check(in_)
        image = np.asarray(data, np.float32)
        size = self.inputs[in_][2:]
        if image.shape[:2] != size:
            image = resize_image(image, size)
        if in_ in self.transpose:
            image = image.transpose(self.transpose[in_])
        if in_ in self.channel_swap:
            image = image[list(self.channel_swap[in_])]
        if in_ in self.raw_scale:
            image = image * np.float32(self.raw_scale[in_])
        if in_ in self.mean:
            image = image - self.mean[in_]
        if in_ in self.input_scale:
            image = image * np.float32(self.input_scale[in_])
        return np.ascontiguousarray(image, np.float32)

    def deprocess(self, in_: str, data: Array) -> Array:
        """The way back from ``preprocess``, but for the size."""
        self._check(in_)
        image = np.array(data, np.float32).squeeze()
        if in_ in self.input_scale:
            image = image / np.float32(self.input_scale[in_])
        if in_ in self.mean:
            image = image + self.mean[in_]
        if in_ in self.raw_scale:
            image = image / np.float32(self.raw_scale[in_])
        if in_ in self.channel_swap:
            image = image[np.argsort(self.channel_swap[in_])]
        if in_ in self.transpose:
            image = image.transpose(np.argsort(self.transpose[in_]))
        return image

    def set_transpose(self, in_: str, order: Sequence[int]) -> None:
        """How axes are ordered, as (2, 0, 1) for channels first."""
        self._check(in_)
        if len(order) != len(self.inputs[in_]) - 1:
            raise ValueError(
                f"an item of {in_!r} has {len(self.inputs[in_]) - 1} axes, but {len(order)} are "
                "ordered"
            )
        self.transpose[in_] = order

    def set_channel_swap(self, in_: str, order: Sequence[int]) -> None:
        """Which channel comes where, as (2, 1, 0) for blue first."""
        self._check(in_)
        if len(order) != self.inputs[in_][1]:
            raise ValueError(
                f"{in_!r} has {self.inputs[in_][1]} channels, but {len(order)} are ordered"
            )
        self.channel_swap[in_] = order

    def set_raw_scale(self, in_: str, scale: float) -> None:
        """By what pixels are multiplied before the mean is taken off: 255 for those up to 1."""
        self._check(in_)
        self.raw_scale[in_] = scale

    def set_mean(self, in_: str, mean: Array) -> None:
        """What is taken off: a value for each channel, or for each pixel."""
        self._check(in_)
        mean = np.asarray(mean, np.float32)
        wanted = self.inputs[in_][1:]
        if mean.ndim == 1:
            if len(mean) not in (1, wanted[0]):
                raise ValueError(f"{in_!r} has {wanted[0]} channels, but the mean {len(mean)}")
            mean = mean[:, None, None]
        else:
            mean = mean[None] if mean.ndim == 2 else mean
            if mean.shape != wanted:
                raise ValueError(
                    f"the mean has the shape {list(mean.shape)}, an item of {in_!r} {list(wanted)}"
                )
        self.mean[in_] = mean

    def set_input_scale(self, in_: str, scale: float) -> None:
        """By what pixels are multiplied at the end."""
        self._check(in_)
        self.input_scale[in_] = scale


def blobproto_to_array(blob: Any, return_diff: bool = False) -> Array:
    """The values, or the gradient, of a ``BlobProto``."""
    values = np.array(blob.diff if return_diff else blob.data, np.float32)
    old = any(blob.HasField(name) for name in ("num", "channels", "height", "width"))
    shape = (blob.num, blob.channels, blob.height, blob.width) if old else tuple(blob.shape.dim)
    return values.reshape(shape)


def array_to_blobproto(arr: Array, diff: Array | None = None) -> Any:
    """A ``BlobProto`` of an array."""
    blob = caffe_pb2.BlobProto()
    blob.shape.dim.extend(arr.shape)
    blob.data.extend(np.asarray(arr, np.float32).ravel())
    if diff is not None:
        blob.diff.extend(np.asarray(diff, np.float32).ravel())
    return blob


def arraylist_to_blobprotovector_str(arraylist: Sequence[Array]) -> bytes:
    """Arrays as the bytes of a ``BlobProtoVector``."""
    vector = caffe_pb2.BlobProtoVector()
    vector.blobs.extend(array_to_blobproto(one) for one in arraylist)
    return vector.SerializeToString()


def blobprotovector_str_to_arraylist(str: bytes) -> list[Array]:  # noqa: A002 - Caffe's name.
    """The arrays in the bytes of a ``BlobProtoVector``."""
    return [blobproto_to_array(one) for one in caffe_pb2.BlobProtoVector.FromString(str).blobs]


def array_to_datum(arr: Any, label: int | None = None) -> Any:
    """A ``Datum`` of an array (channels, height, width): of bytes, or of numbers."""
    if arr.ndim != 3:
        raise ValueError(f"a Datum has 3 axes, not those of {list(arr.shape)}")
    datum = caffe_pb2.Datum()
    datum.channels, datum.height, datum.width = arr.shape
    if arr.dtype == np.uint8:
        datum.data = arr.tobytes()
    else:
        datum.float_data.extend(np.asarray(arr, np.float32).ravel())
    if label is not None:
        datum.label = label
    return datum


def datum_to_array(datum: Any) -> Any:
    """The array in a ``Datum`` that is not compressed; its label is in ``datum.label``."""
    shape = (datum.channels, datum.height, datum.width)
    if datum.data:
        return np.frombuffer(datum.data, np.uint8).reshape(shape)
    return np.array(datum.float_data, np.float32).reshape(shape)
