"""How busy the cores are, by counters that are written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from soonest.bench import load
from soonest.bench.load import Load


def stand_still(
    monkeypatch: pytest.MonkeyPatch, *counts: list[int], cores: int = 2, seconds: float = 10.0
) -> None:
    """Lets ``/proc/stat`` tell these counts one after the other, in hundredths of a second."""
    lines = iter([f"cpu  {' '.join(map(str, one))}\ncpu0 1 2 3\n" for one in counts])
    clock = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(Path, "read_text", lambda self: next(lines))
    monkeypatch.setattr(load.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(load.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(load.time, "perf_counter", lambda: next(clock))


# user, nice, system, idle, iowait, irq, softirq, steal
BEFORE = [1000, 10, 500, 9000, 50, 5, 20, 0]


@pytest.mark.parametrize(
    ("place", "busy"),
    [(0, True), (1, True), (2, True), (3, False), (4, False), (5, True), (6, True)],
    ids=["user", "nice", "system", "idle", "iowait", "irq", "softirq"],
)
def test_all_that_cores_do_is_load_and_waiting_is_not(
    place: int, busy: bool, monkeypatch: pytest.MonkeyPatch
):
    """5 s of 10 s on two cores are a quarter."""
    after = [count + 500 * (index == place) for index, count in enumerate(BEFORE)]
    stand_still(monkeypatch, BEFORE, after)
    with Load() as found:
        pass
    assert found.share == pytest.approx(0.25 if busy else 0.0)


def test_it_is_never_more_than_all(monkeypatch: pytest.MonkeyPatch):
    stand_still(monkeypatch, BEFORE, [9 * count for count in BEFORE], seconds=1.0)
    with Load() as found:
        pass
    assert found.share == 1.0
