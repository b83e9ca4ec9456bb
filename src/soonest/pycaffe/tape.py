"""The layers of a net run one by one, and gone back through from what was kept of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from soonest.caffe.layers.inputs import Fed
from soonest.caffe.net.step import Step, listed
from soonest.pycaffe.blobs import NetBlob


class Tape:
    """What each layer read and gave when it was last run.

    Args:
        steps: the layers of the net, in their order.
        blobs: what lies between them, by name; read and written.

    Attributes:
        runs: whether it is running a layer just now.
    """

    def __init__(self, steps: Sequence[Step], blobs: Mapping[str, NetBlob]) -> None:
        self._steps = steps
        self._blobs = blobs
        self._kept: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self.runs = False

    def run(self, number: int) -> None:
        """Runs one layer and keeps what it reads for the way back.

        Raises:
            ValueError: its bottoms have shapes that it cannot take.
        """
        step = self._steps[number]
        if step.layer.spec.type == "Input":
            return
        # Of their own: layers in place write over what others have read.
        read = [torch.from_numpy(self._blobs[name].data.copy()) for name in step.bottoms]
        for bottom, stop in zip(read, step.stops, strict=True):
            bottom.requires_grad_(not stop)
        self.runs = True
        try:
            with torch.enable_grad():
                tops = listed(step.layer()) if isinstance(step.layer, Fed) else step.run(read)
        except ValueError as error:
            raise ValueError(f"{step.place}: {error}") from None
        finally:
            self.runs = False
        self._kept[number] = read, tops
        for name, top in zip(step.tops, tops, strict=True):
            self._blobs[name].take(top)

    def go_back(self, last: int, first: int) -> None:
        """Takes diffs from the tops of one layer back to the bottoms of another one before it."""
        sent: dict[str, Tensor] = {}
        for number in range(last, first - 1, -1):
            if number not in self._kept:
                continue
            step = self._steps[number]
            read, tops = self._kept[number]
            pairs: list[tuple[Tensor, Tensor]] = []
            for name, top in zip(step.tops, tops, strict=True):
                blob = self._blobs[name]
                if name in sent:
                    blob.take_diff(sent.pop(name))
                if top.requires_grad:
                    pairs.append((top, torch.from_numpy(blob.diff.copy()).reshape(top.shape)))
            for name, gradient in self._gradients(step, read, pairs):
                sent[name] = sent[name] + gradient if name in sent else gradient
        for name, gradient in sent.items():
            self._blobs[name].take_diff(gradient)

    def _gradients(
        self, step: Step, read: list[Tensor], pairs: list[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """What a layer sends to its bottoms; what it learns gets its own."""
        if not pairs:
            return
        for bottom in read:
            bottom.grad = None
        tops, diffs = zip(*pairs, strict=True)
        torch.autograd.backward(tops, diffs, retain_graph=True)
        for name, bottom in zip(step.bottoms, read, strict=True):
            if bottom.grad is not None:
                yield name, bottom.grad
