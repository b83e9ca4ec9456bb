"""The ways to make a training data-parallel that the demo compares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import soonest
from soonest.bench.observe import DdpObserver
from soonest.core.timeline import Timeline
from soonest.demo.settings import ARMS


class Arm(Protocol):
    """A model and an optimizer that train on all ranks together.

    Attributes:
        model: what to call in the training loop.
        settled: whether steps stay alike from now on.
    """

    model: nn.Module

    @property
    def settled(self) -> bool: ...

    def flush(self) -> None:
        """Waits until nothing is under way any more."""

    def observe(self) -> None:
        """Gets ready for ``timeline``; steps may take longer from here on."""

    def timeline(self) -> Timeline | None:
        """The last complete step."""


class Ddp:
    """DistributedDataParallel, with these options."""

    settled = True

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, bucket_cap_mb: float | None = None
    ):
        self._ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
        self.model: nn.Module = self._ddp
        self._optimizer = optimizer

    def flush(self) -> None:
        pass  # backward() has waited.

    def observe(self) -> None:
        self._observer = DdpObserver(self._ddp, self._optimizer, title=ARMS["ddp"])

    def timeline(self) -> Timeline | None:
        return self._observer.timeline()


class Soonest:
    """The one added line."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self._handle = soonest.prioritize(model, optimizer)
        self.flush = self._handle.flush
        self.timeline = self._handle.timeline

    @property
    def settled(self) -> bool:
        return self._handle.settled

    def observe(self) -> None:
        pass  # It always does.


MAKERS: dict[str, Callable[[nn.Module, Optimizer], Arm]] = {
    "ddp": Ddp,
    "ddp-small": partial(Ddp, bucket_cap_mb=1),
    "soonest": Soonest,
}
"""By the names of ``settings.ARMS``."""
