"""Of which shapes a layer's tops are, before it has run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from soonest.caffe.layers.base import Shape
from soonest.caffe.layers.python import ArrayBlob, Python
from soonest.caffe.net.step import Step, listed


def inferred(step: Step, shapes: Sequence[Shape]) -> list[Shape]:
    """Of a layer's tops, from those of its bottoms."""
    if isinstance(step.layer, Python):
        bottom = [ArrayBlob(shape) for shape in shapes]
        names = list(step.bottoms)
        top = [bottom[names.index(one)] if one in names else ArrayBlob() for one in step.tops]
        step.layer.user.reshape(bottom, top)
        return [blob.shape for blob in top]
    blobs = {
        name: tensor.to("meta")
        for name, tensor in [*step.layer.named_parameters(), *step.layer.named_buffers()]
    }
    bottoms = tuple(torch.empty(shape, device="meta") for shape in shapes)
    with torch.no_grad(), torch.device("meta"):
        tops = torch.func.functional_call(step.layer, blobs, bottoms)
    return [tuple(top.shape) for top in listed(tops)]
