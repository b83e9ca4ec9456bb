"""Log lines as Caffe prints them: people have scripts that read them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import datetime

import torch

from soonest.caffe.net import Net

Say = Callable[[str], None]


def to_stderr(message: str) -> None:
    """Prints a line with the prefix of Google's logger, which Caffe uses.

    That is: how grave it is, the date, the thread, and the place in the code.
    """
    stamp = datetime.now().strftime("%m%d %H:%M:%S.%f")
    sys.stderr.write(f"I{stamp} {os.getpid():5d} caffe:0] {message}\n")
    sys.stderr.flush()


def silent(message: str) -> None:
    """Prints nothing: what ranks other than the first do."""


def outputs(kind: str, net: Net, values: dict[str, torch.Tensor]) -> list[str]:
    """A line for each number that a net gives.

    Args:
        kind: ``Train`` or ``Test``.
        net: which gave them.
        values: by name of the blob.
    """
    lines: list[str] = []
    for name, blob in values.items():
        weight = net.loss_weight(name)
        for value in blob.detach().flatten().tolist():
            loss = f" (* {weight:g} = {weight * value:g} loss)" if weight else ""
            lines.append(f"    {kind} net output #{len(lines)}: {name} = {value:g}{loss}")
    return lines


class Smoothed:
    """The mean of the last losses, as Caffe computes it.

    Args:
        over: how many; ``average_loss`` of the solver.
    """

    def __init__(self, over: int) -> None:
        self._over = over
        self._losses: list[float] = []
        self._seen = 0
        self.value = 0.0

    def add(self, loss: float) -> None:
        """Takes in the loss of an iteration."""
        if len(self._losses) < self._over:
            self._losses.append(loss)
            count = len(self._losses)
            self.value = (self.value * (count - 1) + loss) / count
        else:
            place = self._seen % self._over
            self.value += (loss - self._losses[place]) / self._over
            self._losses[place] = loss
        self._seen += 1


class Pace:
    """How fast iterations go.

    Args:
        iteration: the first.
    """

    def __init__(self, iteration: int) -> None:
        self._last = iteration
        self._began_s = time.perf_counter()

    def lap(self, iteration: int) -> tuple[float, float]:
        """Iterations a second since the last lap, and how many seconds that was."""
        now_s = time.perf_counter()
        lapse_s = now_s - self._began_s
        rate = (iteration - self._last) / (lapse_s or 1.0)
        self._last, self._began_s = iteration, now_s
        return rate, lapse_s
