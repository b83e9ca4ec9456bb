"""Some faults of the storm, of all sorts; and that each kind can be drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.asked import asked_for

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FOUND = (26, 115, 119, 217, 237, 336, 426, 428, 503, 539)
"""These have ended badly once."""
SEEDS = tuple(dict.fromkeys((*range(50), *FOUND)))
SLACK_S = "20"
"""Several faults compute at a time."""


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    record = tmp_path_factory.mktemp("storm") / "storm.json"
    seeds = ",".join(map(str, asked_for(request, "seed")))
    words = ["--seeds", seeds, "--jobs", "4", "--slack", SLACK_S, "--json", str(record)]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "storm.py", *words],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert record.exists(), done.stdout + done.stderr
    return {one["seed"]: one for one in json.loads(record.read_text())["faults"]}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fault_ends_well(seed: int, found: dict[int, dict[str, Any]]) -> None:
    assert seed in found, "it has not ended"
    assert found[seed]["wrong"] is None, found[seed]


def test_every_kind_and_configuration_is_drawn() -> None:
    sys.path.append(str(BENCHMARKS))
    try:
        from storm_faults import CONFIGURATIONS, KINDS, Fault
    finally:
        sys.path.remove(str(BENCHMARKS))
    drawn = [Fault.drawn(seed) for seed in range(2000)]
    assert {one.kind for one in drawn} == set(KINDS)
    assert {one.configuration for one in drawn} == set(CONFIGURATIONS)
    assert all(0 <= one.rank < one.ranks for one in drawn)
    assert [Fault.drawn(seed) for seed in range(50)] == drawn[:50]
