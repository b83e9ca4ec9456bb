"""pycaffe's ``Classifier``: classes of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from soonest.caffe.io.blobs import Array
from soonest.pycaffe import io
from soonest.pycaffe.net import TEST, Net


class Classifier(Net):
    """A net with one input that gives a value for each class.

    Args:
        model_file: its definition.
        pretrained_file: its weights.
        image_dims: height and width to bring images to, before cuts; by default those of the input.
        mean: what is taken off, for the input's transformer.
        input_scale: for that, too.
        raw_scale: for that, too.
        channel_swap: for that, too.
    """

    def __init__(
        self,
        model_file: str,
        pretrained_file: str,
        image_dims: Sequence[int] | None = None,
        mean: Array | None = None,
        input_scale: float | None = None,
        raw_scale: float | None = None,
        channel_swap: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model_file, TEST, weights=pretrained_file)
        self.transformer = transformer(self, mean, input_scale, raw_scale, channel_swap)
        self.crop_dims = np.array(self.blobs[self.inputs[0]].shape[2:])
        self.image_dims = self.crop_dims if not image_dims else np.array(image_dims)

    def predict(self, inputs: Sequence[Array], oversample: bool = True) -> Array:
        """Values of each class for each image.

        Args:
            inputs: images (height, width, channels), as ``io.load_image`` gives them.
            oversample: whether ten cuts of each are taken, and their mean; else the middle.
        """
        images = [io.resize_image(image, self.image_dims) for image in inputs]
        if oversample:
            cuts = io.oversample(images, self.crop_dims)
        else:
            top, left = (np.array(images[0].shape[:2]) - self.crop_dims) // 2
            height, width = self.crop_dims
            cuts = [image[top : top + height, left : left + width] for image in images]
        name = self.inputs[0]
        fed: Any = np.array([self.transformer.preprocess(name, cut) for cut in cuts])
        found = self.forward_all(**{name: fed})[self.outputs[0]]
        if oversample:
            found = found.reshape(len(images), 10, -1).mean(1)
        return found


def transformer(
    net: Net,
    mean: Array | None,
    input_scale: float | None,
    raw_scale: float | None,
    channel_swap: Sequence[int] | None,
) -> io.Transformer:
    """For the one input of a net, with what is given."""
    name = net.inputs[0]
    made = io.Transformer({name: net.blobs[name].shape})
    made.set_transpose(name, (2, 0, 1))
    if mean is not None:
        made.set_mean(name, mean)
    if input_scale is not None:
        made.set_input_scale(name, input_scale)
    if raw_scale is not None:
        made.set_raw_scale(name, raw_scale)
    if channel_swap is not None:
        made.set_channel_swap(name, channel_swap)
    return made
