"""``debug_info``: how large every blob and every gradient is, forward and back, on average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soonest.caffe.io.log import Say
from soonest.caffe.layers.base import gradient

if TYPE_CHECKING:
    from soonest.caffe.net.net import Net

Top = tuple[int, int]
"""A step by number, and which of its tops."""


class Watch:
    """Watches one pass through a net, and the way back.

    Where several layers read a blob, Caffe puts a layer that splits it. These have lines, too.

    Args:
        net: it is told of by its ``forward``.
        say: what log lines go to.
    """

    def __init__(self, net: Net, say: Say) -> None:
        self._net, self._say = net, say
        self._splits, self._bottom_names = _splits(net)
        self._read: list[list[Tensor]] = []
        self._given: list[list[Tensor]] = []

    def reads(self, bottoms: Sequence[Tensor]) -> list[Tensor]:
        """What the next step is to read: each reader's own, for the gradient that it sends."""
        read = [bottom.view_as(bottom) if bottom.requires_grad else bottom for bottom in bottoms]
        self._read.append(_kept(read))
        return read

    def gives(self, tops: Sequence[Tensor]) -> None:
        """What it has given."""
        number = len(self._given)
        self._given.append(_kept(tops))
        step = self._net.steps[number]
        name = step.layer.spec.name
        for top_name, top in zip(step.tops, tops, strict=True):
            self._forward(name, f"top blob {top_name}", top)
        for which, blob in enumerate(step.layer.blobs()):
            self._forward(name, f"param blob {self._display_name(number, which)}", blob)
        for place, top in enumerate(tops):
            for split_name in self._splits.get((number, place), []):
                self._forward(split_name.rpartition("_")[0], f"top blob {split_name}", top)

    def _forward(self, layer: str, what: str, values: Tensor) -> None:
        self._say(f"    [Forward] Layer {layer}, {what} data: {_mean(values):g}")

    def _display_name(self, number: int, which: int) -> str:
        params = self._net.steps[number].layer.spec.param
        return (params[which].name if which < len(params) else "") or str(which)

    def back(self) -> None:
        """Says what the gradients are, once they are there."""
        for number in reversed(range(len(self._given))):
            step = self._net.steps[number]
            tops = self._given[number]
            for place in reversed(range(len(tops))):
                names = self._splits.get((number, place))
                if names and (sent := tops[place].grad) is not None:
                    self._backward(names[0].rpartition("_")[0], step.tops[place], sent)
            if all(top.grad is None for top in tops):
                continue  # The loss does not depend on it.
            name = step.layer.spec.name
            for bottom_name, bottom in zip(
                self._bottom_names[number], self._read[number], strict=True
            ):
                if bottom.grad is not None:
                    self._backward(name, bottom_name, bottom.grad)
            for which, blob in enumerate(step.layer.blobs()):
                if blob.requires_grad or self._net.definition.force_backward:
                    found = gradient(blob)
                    mean = 0.0 if found is None else _mean(found)
                    self._say(f"    [Backward] Layer {name}, param blob {which} diff: {mean:g}")
        data = [blob.tensor.detach() for blob in self._net.stored]
        found = [gradient(blob.tensor) for blob in self._net.stored]
        diff = [one for one in found if one is not None]
        ones, twos = ([_norm(tensors, order) for tensors in (data, diff)] for order in (1, 2))
        self._say(
            f"    [Backward] All net params (data, diff): L1 norm = ({ones[0]:g}, {ones[1]:g}); "
            f"L2 norm = ({twos[0]:g}, {twos[1]:g})"
        )

    def _backward(self, layer: str, bottom: str, sent: Tensor) -> None:
        self._say(f"    [Backward] Layer {layer}, bottom blob {bottom} diff: {_mean(sent):g}")


def _kept(tensors: Sequence[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.retain_grad()
    return list(tensors)


def _mean(values: Tensor) -> float:
    return values.detach().abs().sum().item() / max(1, values.numel())


def _norm(tensors: Sequence[Tensor], order: int) -> float:
    if not tensors:
        return 0.0
    return torch.nn.utils.get_total_norm(tensors, norm_type=float(order)).item()


def _splits(net: Net) -> tuple[dict[Top, list[str]], list[list[str]]]:
    """Names of what Caffe makes of tops with several readers, and of the bottoms of each step.

    A top with a loss weight of its own is read by the loss, too, before all others.
    """
    latest: dict[str, Top] = {}
    readers: dict[Top, list[tuple[int, int]]] = {}
    for number, step in enumerate(net.steps):
        for place, name in enumerate(step.bottoms):
            readers.setdefault(latest[name], []).append((number, place))
        latest.update({name: (number, place) for place, name in enumerate(step.tops)})
    names = [list(step.bottoms) for step in net.steps]
    splits: dict[Top, list[str]] = {}
    for (number, place), own in readers.items():
        step = net.steps[number]
        blob = step.tops[place]
        counts = bool(step.layer.spec.has("loss_weight") and step.weights[place])
        if len(own) + counts < 2:
            continue
        stem = f"{blob}_{step.layer.spec.name}_{place}_split"
        splits[number, place] = [f"{stem}_{which}" for which in range(len(own) + counts)]
        for which, (reader, bottom) in enumerate(own, int(counts)):
            names[reader][bottom] = f"{stem}_{which}"
    return splits, names
