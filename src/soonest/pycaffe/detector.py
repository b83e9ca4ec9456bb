"""pycaffe's ``Detector``: classes of windows in images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from soonest.caffe.io.blobs import Array
from soonest.pycaffe import io
from soonest.pycaffe.classifier import transformer
from soonest.pycaffe.net import TEST, Net


class Detector(Net):
    """A net with one input that gives a value for each class.

    Args:
        model_file: its definition.
        pretrained_file: its weights.
        mean: what is taken off, for the input's transformer.
        input_scale: for that, too.
        raw_scale: for that, too.
        channel_swap: for that, too.
        context_pad: how many pixels of the input show what is around a window.
    """

    def __init__(
        self,
        model_file: str,
        pretrained_file: str,
        mean: Array | None = None,
        input_scale: float | None = None,
        raw_scale: float | None = None,
        channel_swap: Sequence[int] | None = None,
        context_pad: int | None = None,
    ) -> None:
        super().__init__(model_file, TEST, weights=pretrained_file)
        self.transformer = transformer(self, mean, input_scale, raw_scale, channel_swap)
        self.context_pad = context_pad or 0

    def detect_windows(
        self, images_windows: Iterable[tuple[str, Iterable[Sequence[float]]]]
    ) -> list[dict[str, Any]]:
        """What is in windows of images.

        Args:
            images_windows: names of images, each with windows (top, left, bottom, right).

        Returns:
            For each window its image's name, itself, and the value of each class.
        """
        name = self.inputs[0]
        places: list[tuple[str, Any]] = []
        cuts: list[Any] = []
        for filename, windows in images_windows:
            image = io.load_image(filename).astype(np.float32)
            for window in windows:
                places.append((filename, np.asarray(window)))
                cuts.append(self.transformer.preprocess(name, self.crop(image, window)))
        if not cuts:
            return []
        fed: Any = np.array(cuts)
        found = self.forward_all(**{name: fed})[self.outputs[0]]
        found = found.reshape(len(cuts), -1)
        return [
            {"window": window, "prediction": values, "filename": filename}
            for (filename, window), values in zip(places, found, strict=True)
        ]

    def detect_selective_search(self, image_fnames: Sequence[str]) -> list[dict[str, Any]]:
        """Not here: its windows came from a program for Matlab."""
        raise NotImplementedError(
            "selective search needs Matlab: find windows otherwise, and call detect_windows"
        )

    def crop(self, image: Array, window: Sequence[float]) -> Array:
        """A window of an image, with ``context_pad`` pixels of the input around it.

        What is outside of the image shows the mean, which becomes zero.
        """
        top, left, bottom, right = (round(float(one)) for one in window)
        if not self.context_pad:
            return image[top:bottom, left:right]
        size = self.blobs[self.inputs[0]].shape[2]
        scale = size / (size - 2 * self.context_pad)
        half_high, half_wide = (bottom - top + 1) * scale / 2, (right - left + 1) * scale / 2
        middle = (top + (bottom - top + 1) / 2, left + (right - left + 1) / 2)
        around = np.round([middle[0] - half_high, middle[1] - half_wide,
                           middle[0] + half_high, middle[1] + half_wide]).astype(int)  # fmt: skip
        inside = np.clip(around, 0, [*image.shape[:2], *image.shape[:2]])
        canvas = np.empty((around[2] - around[0], around[3] - around[1], image.shape[2]),
                          np.float32)  # fmt: skip
        canvas[...] = self._empty()
        first = inside[:2] - around[:2]
        last = first + inside[2:] - inside[:2]
        canvas[first[0] : last[0], first[1] : last[1]] = image[
            inside[0] : inside[2], inside[1] : inside[3]
        ]
        return canvas

    def _empty(self) -> Any:
        """A pixel that becomes zero, in the image's own order of channels and scale."""
        own, name = self.transformer, self.inputs[0]
        if name not in own.mean:
            return 0.0
        pixel = own.mean[name].mean((1, 2)) / own.raw_scale.get(name, 1.0)
        return pixel[np.argsort(own.channel_swap[name])] if name in own.channel_swap else pixel
