"""The parts of ``benchmarks/gpu_check.py``, with the CPU in the place of the GPU."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import stand_in
from helpers.ranks import run_ranks
from soonest.core.trace import Trace

PARTS = ("parity", "quiet", "races", "graphs", "overhead", "host", "overlap", "traces")


def parts(names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """What each part tells."""
    gpu_rank = stand_in.rehearse()
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            gpu_rank.tell = lambda kind, name=name, **content: told[name].append(content)
            words = ["resnet50"] if name == "overhead" else []
            gpu_rank.PARTS[name](torch.device("cpu"), Path(folder), *words)
    return told


@pytest.fixture(scope="module")
def told() -> dict[str, list[dict[str, Any]]]:
    (rank,) = run_ranks(parts, 1, PARTS)
    return rank


@pytest.mark.parametrize("name", PARTS)
def test_every_part_tells_one_thing(name: str, told: dict[str, list[dict[str, Any]]]) -> None:
    (message,) = told[name]
    assert message["found"]
    if name in ("parity", "quiet", "races", "graphs"):
        assert message["ok"] is True, message["found"]


def test_traces_can_be_read(told: dict[str, list[dict[str, Any]]]) -> None:
    traces = told["traces"][0]["figures"]["traces"]
    assert set(traces) == {"resnet50", "gpt2-small"}
    trace = Trace.from_json(traces["gpt2-small"])
    assert trace.info["device"] == "a CPU"
    assert trace.total_bytes == sum(layer.bytes for layer in trace.layers) > 50 * 64 * 4
    assert trace.forward_s > 0
    assert trace.backward_s > 0
    assert trace.update_us > 0


def test_a_part_that_fails_or_hangs_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(stand_in.BENCHMARKS))
    import gpu_check
    from gpu_check import Part

    monkeypatch.setattr(gpu_check, "RANK", (sys.executable, stand_in.__file__))
    monkeypatch.setenv("SOONEST_CACHE", "")  # both are set for the ranks
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    written: list[int] = []
    write = Path.write_text

    def note(path: Path, text: str, **options: Any) -> int:
        written.append(len(json.loads(text)["rows"]))
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", note)
    names = ("name", "torch", "cuda", "nccl")
    rows = gpu_check.check_all(
        [
            Part("no such part", "one that fails", 100),
            Part("stuck", "one that hangs", 8),
            Part("parity", "as DDP", 200, 2, "gloo"),
        ],
        {"count": 1, **dict.fromkeys(names, "none")},
        record=tmp_path / "record.json",
        traces=tmp_path / "traces",
    )
    assert [row.ok for row in rows] == [False, False, True], capsys.readouterr()
    failed, hung, equal = rows
    assert "KeyError: 'no such part'" in failed.found
    assert "did not end within 8 s" in hung.found
    assert equal.found == "5 ways of training, bit by bit"
    assert written == [1, 2, 3]
    record = json.loads((tmp_path / "record.json").read_text())
    assert [row["ok"] for row in record["rows"]] == [False, False, True]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "1", "one", "one", "as",
    ]  # fmt: skip


def test_no_part_is_begun_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(stand_in.BENCHMARKS))
    import gpu_check

    monkeypatch.setattr(gpu_check, "LIMIT_S", 0.0)
    rows = list(gpu_check._rows(gpu_check.parts_for(1), tmp_path))
    assert {row.found for row in rows} == {"left out: no time was left"}
    assert {row.ok for row in rows} == {None}
