"""Several workers run tests side by side, but those that measure time run one at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LONG = (
    "parity",
    "fuzz",
    "runtime/test_restart.py",
)
"""First, so that no worker is left with one of these at the end."""
ALONE = (
    "lab",
    "bench",
    "demo",
    "benchmarks",
    "runtime/test_drift.py",
    "runtime/test_lateness.py",
    "runtime/test_learning.py",
    "runtime/test_throughput.py",
)
"""Folders and files whose tests compare times."""


def _is_in(item: pytest.Item, places: tuple[str, ...]) -> bool:
    path = item.path.relative_to(HERE)
    return any(path.is_relative_to(place) for place in places)


def _is_alone(item: pytest.Item) -> bool:
    return _is_in(item, ALONE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (_is_alone(item), not _is_in(item, LONG)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if _is_alone(item) else fcntl.LOCK_SH)
        return (yield)
