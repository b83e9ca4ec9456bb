"""``soonest bench`` on real emulated hosts."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from soonest.bench.settings import ARMS
from soonest.cli import main
from soonest.core.trace import Layer, Trace

pytestmark = pytest.mark.usefixtures("needs_lab")

PNG = b"\x89PNG"
SMALL = Trace(
    "small",
    (
        Layer("first", 40_000, 3e3, 5e3),
        Layer("second", 200_000, 3e3, 5e3),
        Layer("last", 80_000, 2e3, 4e3),
    ),
)
QUICK = ("--hosts", "2", "--steps", "2", "--rounds", "1", "--slow-motion", "1", "--shrink", "1")
HERE = [arm for arm in ARMS if arm not in ("deepspeed-zero1", "horovod")]


def write(trace: Trace, folder: Path) -> str:
    path = folder / "trace.json"
    path.write_text(json.dumps(trace.to_json()), encoding="utf-8")
    return str(path)


def bench(trace: Trace, folder: Path, *words: str) -> dict[str, Any]:
    record = folder / "record.json"
    asked = ["bench", "--trace", write(trace, folder), *QUICK, "--json", str(record), *words]
    assert main(asked) == 0
    return json.loads(record.read_text())


def test_all_arms_on_the_same_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pictures = [tmp_path / "bars.png", tmp_path / "step.png"]
    drawn = ["--picture", str(pictures[0]), "--timeline", str(pictures[1])]
    record = bench(SMALL, tmp_path, "--arms", ",".join(HERE), "--slow-motion", "2", *drawn)
    assert {key: record[key] for key in ("hosts", "slow_motion", "shrink")} == {
        "hosts": 2,
        "slow_motion": 2.0,
        "shrink": 1.0,
    }
    assert record["trace"] == str(tmp_path / "trace.json")
    assert record["communication_ms"] == pytest.approx(22.0), "as long as computing, if not asked"
    # To send the first two layers, and what the last two compute.
    assert record["bound_ms"] == pytest.approx(0.75 * 22 + 14)
    assert record["link_bps"] == pytest.approx(320_000 * 8 / 0.022 * 1514 / 1448)
    assert list(record["arms"]) == HERE
    for name, arm in record["arms"].items():
        assert len(arm["step_ms_all"]) == 2
        assert min(arm["step_ms_all"]) <= arm["step_ms"] <= max(arm["step_ms_all"])
        floor_ms = 22.0 if name == "local" else 30.5
        assert arm["step_ms"] > 0.97 * floor_ms, "no arm beats what is possible"
        assert 0 <= arm["load"] <= 1  # in steps of what the kernel counts
    assert any(arm["load"] > 0 for arm in record["arms"].values())
    assert record["arms"]["local"]["step_ms"] < record["arms"]["sequential"]["step_ms"]
    tuned = record["arms"]["ddp-tuned"]
    assert list(tuned["sweep_ms"]) == ["default"], "every bucket size holds the whole model"
    assert [t["title"] for t in record["timelines"].values()] == ["soonest", "ddp-tuned"]
    names = {span["name"] for span in record["timelines"]["soonest"]["spans"]}
    assert {"first", "second", "last"} <= names, "layers have the names of the trace"
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)
    said = capfd.readouterr()
    assert "The parameters of all arms are right" in said.out
    assert all(f"│ {arm}" in said.out for arm in HERE)
    assert "100%  soonest:" in said.out, "progress in plain lines"
    assert not said.err


def test_a_wrong_arm_gives_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    record = bench(SMALL, tmp_path, "--arms", "own_arms:right")
    assert list(record["arms"]) == ["own_arms:right"]
    capfd.readouterr()
    (tmp_path / "record.json").unlink()
    asked = ["bench", "--trace", str(tmp_path / "trace.json"), *QUICK]
    asked += ["--arms", "own_arms:right,own_arms:wrong", "--json", str(tmp_path / "record.json")]
    assert main(asked) == 1
    said = capfd.readouterr()
    assert "no figures, for the results are wrong: own_arms:wrong: after" in said.err
    assert "1 of 20000 elements looked at are wrong in layer last, first number 1:" in said.err
    assert "(on rank 1)" in said.err
    assert "× bound" not in said.out
    assert not (tmp_path / "record.json").exists()


def many() -> tuple[Layer, ...]:
    """Hundreds of small tensors, some layers without any, some times zero."""
    return tuple(
        Layer(f"layer{i}", 0 if i % 7 == 3 else 4 * (1 + i % 50), 20.0 * (i % 3), 30.0 * (i % 4))
        for i in range(200)
    )


@pytest.mark.parametrize(
    ("trace", "link"),
    [
        (Trace("many", many()), "100mbit"),
        (
            Trace("embedding", (Layer("table", 125_000_000, 2e3, 4e3), Layer("head", 4000, 1, 1))),
            "20gbit",
        ),
        (Trace("no time", (Layer("a", 40_000, 0.0, 0.0), Layer("b", 4, 0.0, 0.0))), "100mbit"),
        (Trace("empty first", (Layer("in", 0, 5e3, 5e3), Layer("b", 4000, 5e3, 5e3))), "1x"),
    ],
    ids=lambda value: value.model.replace(" ", "-") if isinstance(value, Trace) else "",
)
def test_traces_that_nobody_has_seen(trace: Trace, link: str, tmp_path: Path):
    arms = ("local", "ddp", "ddp-zero1", "fsdp2", "soonest")
    shrink = ["--shrink", "16"] if trace.total_bytes > 1e8 else []
    record = bench(trace, tmp_path, "--arms", ",".join(arms), "--link", link, *shrink)
    assert list(record["arms"]) == list(arms)
    assert all(math.isfinite(arm["step_ms"]) for arm in record["arms"].values())


def methods_of(record: dict[str, Any]) -> dict[str, set[str]]:
    return {name: set(arm.get("methods", ())) for name, arm in record["arms"].items()}


def test_what_is_absent_is_named_and_soonest_itself_held_to_one_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("soonest.bench.session.find_spec", lambda name: None)
    record = bench(SMALL, tmp_path, "--arms", "horovod,soonest", "--method", "exchange")
    assert record["absent"] == {"horovod": "horovod is not installed"}
    assert list(record["arms"]) == ["soonest"]
    assert record["method"] == "exchange"
    assert methods_of(record) == {"soonest": {"exchange"}}
    out = capfd.readouterr().out
    assert "horovod is absent: horovod is not installed." in out
    assert "absent" in next(line for line in out.splitlines() if line.startswith("│ horovod"))


def test_soonest_held_to_one_method_beside_soonest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    arms = ("local", "soonest", "soonest-allreduce", "soonest-split", "soonest-hierarchical")
    record = bench(SMALL, tmp_path, "--arms", ",".join(arms))
    assert list(record["arms"]) == list(arms[:-1])
    found = methods_of(record)
    assert found["local"] == set()
    assert found["soonest"] <= {"allreduce", "gather", "exchange", "split"} != set()
    assert found["soonest-allreduce"] == {"allreduce"}
    assert found["soonest-split"] == {"split"}
    assert all(sum(arm.get("methods", {"": 1}).values()) > 0 for arm in record["arms"].values())
    assert "several ranks on each host" in record["absent"]["soonest-hierarchical"]
    out = capfd.readouterr().out
    assert f"Buckets of soonest-split: {record['arms']['soonest-split']['methods']['split']}" in out


def test_slow_motion_and_shrink_are_chosen_by_measuring(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    record_file = tmp_path / "record.json"
    asked = ["bench", "--trace", write(SMALL, tmp_path), "--hosts", "2", "--arms", "local"]
    assert main([*asked, "--steps", "1", "--rounds", "1", "--json", str(record_file)]) == 0
    record = json.loads(record_file.read_text())
    assert record["slow_motion"] * record["bound_ms"] >= 1199
    assert record["shrink"] == 1
    assert "Measuring what this machine can carry with 2 hosts" in capfd.readouterr().out
