"""Scores a net, as ``caffe test`` does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from soonest.caffe.io.log import Say, warning
from soonest.caffe.net.debug import Watch
from soonest.caffe.net.net import Net, Result


class Means:
    """The mean loss, and the mean of each output, over batches."""

    def __init__(self) -> None:
        self._batches = 0
        self._loss = 0.0
        self._sums: dict[str, Tensor] = {}
        self._uneven: set[str] = set()

    def add(self, result: Result) -> None:
        """Takes in a batch."""
        self._batches += 1
        self._loss += result.loss.item()
        for name, blob in result.outputs.items():
            before = self._sums.get(name)
            if before is not None and before.shape != blob.shape:
                self._uneven.add(name)
            elif name not in self._uneven:
                self._sums[name] = blob.clone() if before is None else before + blob

    @property
    def loss(self) -> float:
        return self._loss / max(1, self._batches)

    def outputs(self) -> dict[str, Tensor]:
        """By name; those that had several shapes have no mean, which is warned of."""
        for name in sorted(self._uneven):
            warning(f"{name} has several shapes, so it has no mean: give it to a Silence layer")
        return {
            name: total / self._batches
            for name, total in self._sums.items()
            if name not in self._uneven
        }


@torch.no_grad()
def score(net: Net, batches: int, *, say: Say) -> None:
    """Runs a net on so many batches and says each result and the means.

    Args:
        net: to test.
        batches: how many.
        say: what log lines go to.
    """
    say(f"Running for {batches} iterations.")
    means = Means()
    for batch in range(batches):
        result = net(watch=Watch(net, say) if net.definition.debug_info else None)
        means.add(result)
        for name, blob in result.outputs.items():
            for value in blob.flatten().tolist():
                say(f"Batch {batch}, {name} = {value:g}")
    say(f"Loss: {means.loss:g}")
    for name, blob in means.outputs().items():
        weight = net.loss_weight(name)
        for value in blob.flatten().tolist():
            loss = f" (* {weight:g} = {weight * value:g} loss)" if weight else ""
            say(f"{name} = {value:g}{loss}")


@torch.no_grad()
def tested(
    net: Net,
    batches: int,
    *,
    given_up: Callable[[], bool],
    watch: Callable[[], Watch | None],
) -> tuple[float, dict[str, Tensor]] | None:
    """The mean loss and the mean of each output over so many batches; None if given up."""
    means = Means()
    for _ in range(batches):
        if given_up():
            return None
        means.add(net(watch=watch()))
    return means.loss, means.outputs()
