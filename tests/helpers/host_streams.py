"""Streams that are the host's own order: whatever is enqueued has been done."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class HostEvent:
    at_s: float = field(default_factory=time.perf_counter)

    def query(self) -> bool:
        return True


class HostStreams:
    """A device that has done everything at once."""

    def __init__(self) -> None:
        self.made = 0

    def make(self) -> int:
        self.made += 1
        return self.made

    def current(self) -> int:
        return 0

    def use(self, stream: Any) -> Any:
        return nullcontext()

    def record(self, stream: Any, *, timed: bool = False) -> HostEvent:
        return HostEvent()

    def wait(self, stream: Any, event: Any) -> None: ...

    def seconds(self, first: Any, last: Any) -> float:
        return last.at_s - first.at_s

    def keep(self, tensor: Tensor, stream: Any) -> None: ...

    def capturing(self) -> bool:
        return False
