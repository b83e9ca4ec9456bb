"""How processes end that train: in time, by what has ended them, and with others told why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    program = Path(__file__).parents[1] / "helpers" / "end_of_ranks.py"
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "SOONEST_CACHE": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("when", ["waits", "ends", "ends twice"])
def test_ctrl_c_ends_a_rank_that_waits_for_another(when: str, found: dict[str, Any]) -> None:
    """In the loop, or at the end of the script; there it may come once more."""
    ended = found[when]
    assert ended["code"] == -signal.SIGINT, ended["said"]
    assert ended["took_s"] < 12
    assert ended["left"] == []


def test_the_others_hear_what_has_ended_a_rank(found: dict[str, Any]) -> None:
    ended = found["raises"]
    assert ended["code"] == 1, ended["said"]
    assert "PeerLostError: step " in ended["said"]
    assert "rank 1 (host " in ended["said"]
    assert "failed: KeyError: 'boom'" in ended["said"]


def test_a_script_that_ends_says_for_whom_it_waits(found: dict[str, Any]) -> None:
    ended = found["is late"]
    assert ended["code"] == 0, ended["said"]
    assert "this process ends when what other ranks need is sent" in ended["said"]
    assert "step 7: bucket " in ended["said"]


_LINGERS = """
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

import soonest
from soonest.runtime.device.threads import Helper

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
over_at = time.monotonic() + 1.5


def wait() -> None:
    while time.monotonic() < over_at:
        with suppress(Exception):
            store.wait(["nothing"], timedelta(milliseconds=20))


threads = [Helper(wait, "lingers") for _ in range(4)]
"""


def test_a_thread_that_waits_in_a_backend_does_not_take_the_process_with_it() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _LINGERS], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
