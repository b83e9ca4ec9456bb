"""The whole demo, in short."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from soonest.cli import main
from soonest.demo import session
from soonest.demo.settings import Settings
from soonest.errors import SoonestError
from soonest.lab import unavailable

WHY_NOT = unavailable()
needs_lab = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.mark.parametrize(
    "where", [["--loopback"], pytest.param(["--link", "500mbit"], marks=needs_lab)]
)
def test_a_short_run(where: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    figures_path = tmp_path / "demo.json"
    argv = ["demo", "--steps", "4", "--out", str(tmp_path / "out"), "--json", str(figures_path)]
    assert main([*argv, *where]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "Identical to the last bit: all 8 losses" in out
    assert ("loopback, which holds nothing up" in out) == (where == ["--loopback"])
    assert "a is needed first" in out

    picture = tmp_path / "out" / "demo.png"
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")

    figures = json.loads(figures_path.read_text())
    assert figures["identical"] is True
    assert figures["link_bps"] == (None if where == ["--loopback"] else 500e6)
    losses = figures["arms"]["soonest"]["losses"]
    assert losses == figures["arms"]["ddp"]["losses"]
    assert losses[0] != losses[1], "each rank learns something else"
    assert losses[0][3] < losses[0][0]
    for arm in ("ddp", "soonest"):
        assert figures["arms"][arm]["step_ms"] > 0
        kinds = {span["kind"] for span in figures["arms"][arm]["timeline"]["spans"]}
        assert {"forward", "backward", "send", "update"} <= kinds


def test_a_rank_that_fails_is_heard():
    said: list[str] = []
    with pytest.raises(SoonestError, match="exit code 1"):
        session.run(Settings(batch=-1), loopback=True, say=said.append, watch=lambda *_: None)
    assert any("RuntimeError" in line for line in said)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes by /proc")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path):
    mark = uuid.uuid4().hex

    def alive() -> int:
        def marked(path: Path) -> bool:
            try:
                return mark.encode() in path.read_bytes()
            except OSError:
                return False

        return sum(marked(path) for path in Path("/proc").glob("[0-9]*/environ"))

    with subprocess.Popen(
        [sys.executable, "-m", "soonest", "demo", "--loopback", "--out", str(tmp_path)],
        env={**os.environ, "SOONEST_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "MB of gradients" in line:
                break
        deadline_s = time.monotonic() + 10
        while alive() < 4 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert alive() >= 4, "the demo, its ranks, and what ends them if it is killed"
        os.killpg(demo.pid, signal.SIGINT)
        _, err = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert err == "soonest: interrupted\n"
    deadline_s = time.monotonic() + 10
    while alive() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not alive()
    assert not list(tmp_path.iterdir())
