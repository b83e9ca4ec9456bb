import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Marked:
    """Processes that carry a mark in their environment, as do all that descend from one."""

    def __init__(self):
        self.env = {"SOONEST_TEST_MARK": uuid.uuid4().hex}

    @contextlib.contextmanager
    def start(self, script: str) -> Iterator[subprocess.Popen[str]]:
        """Runs a Python script until the block is left."""
        with subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def alive(self) -> list[int]:
        mark = f"SOONEST_TEST_MARK={self.env['SOONEST_TEST_MARK']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def all_ended(self) -> bool:
        return self.eventually(lambda: not self.alive())

    @staticmethod
    def eventually(true: Callable[[], bool], within_s: float = 20) -> bool:
        deadline_s = time.monotonic() + within_s
        while not true():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.02)
        return True


@pytest.fixture
def marked():
    if not os.path.isdir("/proc/self"):
        pytest.skip("finds processes by /proc, which this system does not have")
    return Marked()
