"""How busy this machine's cores are."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Load:
    """A context that measures the cores' load, whoever causes it, also the kernel's network.

    Attributes:
        share: of what all cores could have done in that time, 0 to 1.
    """

    share = 0.0

    def __enter__(self) -> Load:
        self._before = (time.perf_counter(), _busy_s())
        return self

    def __exit__(self, *exc: object) -> None:
        began, before = self._before
        cores = os.cpu_count() or 1
        self.share = min(1.0, (_busy_s() - before) / (cores * (time.perf_counter() - began)))


def _busy_s() -> float:
    """Seconds that all cores together have worked since the machine started."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = (
        int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
