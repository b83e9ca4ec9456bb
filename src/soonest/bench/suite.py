"""The standing table: the same comparisons for every model, cluster size and network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from soonest.bench import scale, session
from soonest.bench.result import Result
from soonest.bench.scale import Capacity
from soonest.bench.settings import ARMS, Settings, link_for
from soonest.core.trace import Trace
from soonest.writing import write_json

TRACES = ("alexnet", "vgg16", "resnet50", "googlenet")
HOSTS = (2, 4, 8)
LOADS = (0.5, 1.0, 2.0)
"""How many times as long as computing it takes to reduce all gradients."""
_STEPS, _ROUNDS = 3, 2
_CLOSE = 1.05
"""Nearer to the bound than this, a timeline shows nothing worth keeping."""


@dataclass(frozen=True)
class Case:
    """One comparison of the table."""

    trace: str
    hosts: int
    load: float

    @property
    def title(self) -> str:
        return f"{self.trace}, {self.hosts} hosts, synchronizing = {self.load:g} × computing"

    def file(self, folder: Path) -> Path:
        return folder / f"{self.trace}-{self.hosts}-hosts-{self.load:g}x.json"


def cases(
    traces: Sequence[str] = TRACES, hosts: Sequence[int] = HOSTS, loads: Sequence[float] = LOADS
) -> list[Case]:
    """Every combination."""
    return [Case(trace, n, load) for n in hosts for trace in traces for load in loads]


def run(
    chosen: Sequence[Case], folder: Path, *, say: session.Say, watch: session.Watch
) -> Iterator[tuple[Case, Result]]:
    """Runs what has no record yet, and yields each result when its record is written.

    Args:
        chosen: what to run.
        folder: of the records.
        say, watch: see ``session.run``.

    Raises:
        SoonestError: a comparison failed; records written before are kept.
    """
    capacities: dict[int, Capacity] = {}
    left = [case for case in chosen if not case.file(folder).exists()]
    if len(left) < len(chosen):
        say(f"{len(chosen) - len(left)} of {len(chosen)} have a record: they are not run again.")
    for number, case in enumerate(left, 1):
        say(f"{case.title}: {number} of {len(left)}")
        if case.hosts not in capacities:
            capacities[case.hosts] = session.probe(case.hosts, say=say)
        result = session.run(
            _settings(case, capacities[case.hosts]), name=case.trace, say=say, watch=watch
        )
        write(result, case.file(folder))
        yield case, result


def _settings(case: Case, capacity: Capacity) -> Settings:
    trace = Trace.load(case.trace)
    link_bps = link_for(trace, case.hosts, case.load)
    slow_motion, shrink = scale.choose(trace, case.hosts, link_bps, capacity)
    arms = list(ARMS)
    return Settings(trace, case.hosts, link_bps, slow_motion, shrink, arms, _STEPS, _ROUNDS)


def write(result: Result, file: Path) -> None:
    """Writes a record; all of it or nothing, so that an interrupted suite leaves no half ones."""
    record = dict(result.record)
    soonest = next((row for row in result.rows() if row.arm == "soonest"), None)
    if soonest is not None and soonest.over_bound < _CLOSE:
        del record["timelines"]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)


def read(folder: Path) -> dict[Case, Result]:
    """The records that are there, in the order of the table."""
    found: dict[Case, Result] = {}
    for case in cases():
        if case.file(folder).exists():
            found[case] = Result(json.loads(case.file(folder).read_text(encoding="utf-8")))
    return found
