"""Puts trained weights into a net, by the names of its layers."""

from __future__ import annotations

import numpy as np

from soonest.caffe.io.blobs import fits
from soonest.caffe.io.weights import Weights
from soonest.caffe.net.net import Net


def copy_weights(net: Net, weights: Weights, *, file: str = "") -> list[str]:
    """Copies what is stored into layers of the same name; others stay as they are.

    Args:
        net: it is changed.
        weights: as read from a file.
        file: where they are from, for errors.

    Returns:
        The names of stored layers with blobs that the net does not have.

    Raises:
        ValueError: a layer is there with blobs of another number or shape.
    """
    layers = {step.layer.spec.name: step for step in reversed(net.steps)}
    shared = {(layer, name) for blob in net.stored for layer, name in blob.also}
    for layer_name, stored in weights.items():
        if layer_name not in layers:
            continue
        layer = layers[layer_name].layer
        names = layer.blob_names
        what = f"{file or 'weights'}: cannot copy into {layers[layer_name].place}"
        missing = [
            name
            for number, name in enumerate(names)
            if number not in stored and (layer, name) not in shared
        ]
        if missing or any(number >= len(names) for number in stored):
            raise ValueError(f"{what}: it has {len(names)} blobs, but {len(stored)} are stored")
        for number, array in stored.items():
            target = getattr(layer, names[number])
            if not fits(tuple(array.shape), tuple(target.shape)):
                raise ValueError(
                    f"{what}: its blob {number} has the shape {list(target.shape)}, the stored one "
                    f"{list(array.shape)}; to learn it anew, rename the layer"
                )
            np.copyto(target.detach().numpy(), array.reshape(tuple(target.shape)))
    return [name for name, stored in weights.items() if stored and name not in layers]


def share_weights(source: Net, target: Net) -> None:
    """Lets a net use the weights of another, in layers of the same name; neither has them alone.

    Raises:
        ValueError: layers of the same name have blobs of another number or shape.
    """
    layers = {step.layer.spec.name: step.layer for step in reversed(source.steps)}
    for step in target.steps:
        other = layers.get(step.layer.spec.name)
        if other is None:
            continue
        own = [list(blob.shape) for blob in step.layer.blobs()]
        shapes = [list(blob.shape) for blob in other.blobs()]
        if own != shapes:
            raise ValueError(
                f"{step.place}: its blobs have the shapes {own}, but {shapes} in the net that is "
                "trained: give them other names, or the same shapes"
            )
        for name, other_name in zip(step.layer.blob_names, other.blob_names, strict=True):
            if name not in step.layer.looks:  # Else it follows the one that it looks at.
                setattr(step.layer, name, getattr(other, other_name))
