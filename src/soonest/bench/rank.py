"""One rank of a comparison, as a process: ``python -m soonest.bench.rank SETTINGS.json``."""

from __future__ import annotations

import re
import signal
import statistics
import sys
import time
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from soonest.bench.arms import Arm, maker
from soonest.bench.load import Load
from soonest.bench.settings import SWEPT, WARM_UP, Settings
from soonest.core.timeline import Timeline
from soonest.lab.messages import tell
from soonest.lab.replay import measure_overhead_s

_PICTURED = 2
"""Times that a step of DDP is recorded."""
_COMPARED = ("ddp-tuned", "soonest")
"""Arms of which a typical step is kept."""
_TIMEOUT = timedelta(seconds=300)


class Comparison:
    """All arms in one process, in alternation."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.arms: dict[str, Arm] = {}
        self.step_ms: dict[str, list[float]] = {}
        self.load: dict[str, list[float]] = {}
        self.timelines: dict[str, list[Timeline]] = {}

    def run(self) -> None:
        for name in self.settings.arms:
            self._make(name)
        for number in range(self.settings.rounds):
            for name, arm in self.arms.items():
                self._round(name, arm, number)
        self._picture()
        if self._wrong():
            return
        _first(
            "figures",
            step_ms=self.step_ms,
            load={name: statistics.mean(loads) for name, loads in self.load.items()},
            compute_error={name: arm.replay.error for name, arm in self.arms.items()},
            notes={name: arm.note for name, arm in self.arms.items()},
            timelines=self._typical(),
        )

    def _make(self, name: str) -> None:
        _first("making", arm=name)
        arm = maker(name)(self.settings, lambda arm, what: self._try(name, arm, what))
        dist.barrier()
        warm_up(arm)
        _first("made", arm=name)
        self.arms[name], self.step_ms[name], self.load[name] = arm, [], []

    def _try(self, name: str, arm: Arm, bucket: str) -> list[float]:
        dist.barrier()
        seconds = steps(arm, 1 + SWEPT)
        _first("tried", arm=name, bucket=bucket)
        return seconds

    def _round(self, name: str, arm: Arm, number: int) -> None:
        dist.barrier()
        with Load() as load:
            seconds = steps(arm, self.settings.steps + 1)
        self.step_ms[name] += [1e3 * s / self.settings.slow_motion for s in seconds]
        self.load[name].append(load.share)
        self._keep(name, arm)
        _first("round", arm=name, round=number, step_ms=statistics.median(self.step_ms[name]))

    def _keep(self, name: str, arm: Arm) -> None:
        if name in _COMPARED and (timeline := arm.timeline()) is not None:
            self.timelines.setdefault(name, []).append(timeline)

    def _picture(self) -> None:
        arm = self.arms.get("ddp-tuned")
        if arm is not None:
            arm.observe()
            for _ in range(_PICTURED):
                steps(arm, 3)
                self._keep("ddp-tuned", arm)

    def _typical(self) -> dict[str, Any]:
        """The step of each that is nearest to its median, in the trace's own time."""
        slow = self.settings.slow_motion
        found: dict[str, Any] = {}
        for name, timelines in self.timelines.items():
            median_s = statistics.median(self.step_ms[name]) * slow / 1e3
            nearest = min(timelines, key=lambda timeline: abs(timeline.step_s - median_s))
            found[name] = self._named(nearest.scaled(1 / slow, title=name)).to_json()
        return found

    def _named(self, timeline: Timeline) -> Timeline:
        """With the names that the layers have in the trace."""

        def name(match: re.Match[str]) -> str:
            return self.settings.trace.layers[int(match[1])].name

        spans = [
            replace(span, name=re.sub(r"layers\.(\d+)", name, span.name)) for span in timeline.spans
        ]
        return replace(timeline, spans=tuple(spans))

    def _wrong(self) -> bool:
        """Tells which arms have wrong parameters on some rank, or others than on other ranks."""
        wrong: list[str] = []
        for name, arm in self.arms.items():
            arm.flush()
            arm.settle()
            faults = _gather(arm.replay.verify())
            found = [f"{name}: {fault} (on rank {n})" for n, fault in enumerate(faults) if fault]
            if not found and len(set(_gather(arm.replay.checksum()))) > 1:
                found = [f"{name}: the ranks have different parameters"]
            wrong += found
            arm.detach()
        if wrong:
            _first("wrong", faults=wrong)
        return bool(wrong)


def warm_up(arm: Arm) -> None:
    """Trains until the arm has found its way, and a few steps at least."""
    number = 0
    while number < WARM_UP or not arm.ready():
        arm.update(arm.forward())
        number += 1
    arm.flush()


def steps(arm: Arm, number: int) -> list[float]:
    """Trains, and returns the seconds from backward pass to backward pass, mean of all ranks."""
    began: list[float] = []
    for _ in range(number):
        loss = arm.forward()
        began.append(time.perf_counter())
        arm.update(loss)
    arm.flush()
    seconds = [end - start for start, end in pairwise(began)]
    return [statistics.mean(every) for every in zip(*_gather(seconds), strict=True)]


def _gather(value: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def _first(kind: str, **content: Any) -> None:
    """What one rank tells for all."""
    if dist.get_rank() == 0:
        tell(kind, **content)


def main() -> None:
    """What each rank runs."""
    # Ctrl-C reaches every process of a terminal; the one that started the ranks ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    settings = Settings.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    overhead_s = measure_overhead_s(settings.trace, settings.slow_motion, settings.shrink)
    Comparison(replace(settings, overhead_s=overhead_s)).run()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
