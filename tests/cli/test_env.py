"""What a bug report says of a machine."""

import json
from pathlib import Path

import pytest
import torch

from soonest.cli import main


def test_it_prints_and_writes_what_a_report_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOONEST_CACHE", str(tmp_path))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (tmp_path / "network-1.json").write_text("{}")
    (tmp_path / "network-2.json").write_text("{")
    assert main(["env", "--json", str(tmp_path / "env.json")]) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "gloo" in found["backends"]
    assert any(line.startswith("lo ") for line in found["interfaces"])
    assert found["variables"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert found["cache"] == {str(tmp_path): "2 files, damaged: network-2.json"}
    for line in ("torch", "gloo", "GLOO_SOCKET_IFNAME lo", "damaged: network-2.json"):
        assert line in told


def test_a_cache_that_is_switched_off_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOONEST_CACHE", "")
    assert main(["env"]) == 0
    assert "SOONEST_CACHE is empty" in capsys.readouterr().out
