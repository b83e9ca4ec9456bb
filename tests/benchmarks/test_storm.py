"""Some faults of the storm, among them those that have once ended badly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "storm.py"
SLACK_S = "10"


@pytest.mark.parametrize(
    "fault",
    ["2", "4", "6", "10"],
    ids=["ended in a ring", "interrupted", "ends first, with the store", "ends at the end"],
)
def test_a_fault_ends_well(fault: str) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--faults", "1", "--seed", fault, "--slack", SLACK_S],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("0 of 1 ended badly")
