"""PyTorch's own tests of ``DistributedDataParallel`` pass with ours, but for a table of reasons."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.asked import asked_for
from parity.pytorch_suite import CONTROL, control
from parity.pytorch_table import EXCEPTIONS, MOST, TABLE, table


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("suite") / "results.json"
    command = [sys.executable, "-m", "parity.pytorch_suite", "--json", str(path)]
    command += asked_for(request, "name")
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=1500
    )
    assert path.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(path.read_text())


@pytest.mark.timeout(1600)  # the first of them runs them all
@pytest.mark.parametrize("name", control())
def test_it_passes_as_with_torchs_own_class(name: str, results: dict[str, dict[str, Any]]) -> None:
    found = results[name]
    if name in EXCEPTIONS:
        assert found["status"] == "fail", "it passes: take it out of EXCEPTIONS"
    else:
        assert found["status"] == "pass", found["why"]


def test_the_table_does_not_grow() -> None:
    assert len(EXCEPTIONS) <= MOST
    assert set(EXCEPTIONS) <= set(control())
    assert len(control()) >= 70


def test_the_table_is_shown_as_it_is() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(control())


def test_the_control_list_is_of_this_torch() -> None:
    version = torch.__version__.split("+")[0]
    first = CONTROL.read_text(encoding="utf-8").splitlines()[0]
    assert f"torch {version}'s" in first, "renew it: see parity/pytorch_suite.py"
