"""The demo's progress, on a terminal and without one."""

import io
import re

import pytest

from soonest.demo.result import Result
from soonest.demo.settings import Settings
from soonest.demo.show import screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch: pytest.MonkeyPatch, out: io.StringIO) -> str:
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    settings = Settings(steps=20)
    result = Result(settings, compute_s=0.3, gradient_bytes=4000, link_bps=None)
    with screen(settings) as shown:
        shown.say("[Starting] ...")
        for _ in range(20):
            for arm, seconds in (("ddp", 0.6), ("soonest", 0.4)):
                told = {"kind": "step", "arm": arm, "loss": (1.5).hex()}
                result.take(0, {**told, "seconds": seconds, "settled": True})
                shown.watch(result, arm)
    return out.getvalue()


def test_without_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch):
    shown = show(monkeypatch, io.StringIO())
    assert shown.splitlines()[0] == "[Starting] ..."
    assert "\x1b" not in shown
    lines = shown.splitlines()[1:]
    assert len(lines) == 4
    assert re.fullmatch(
        r"DistributedDataParallel +10/20  loss 1.500  2.16 bits per byte  600 ms per step", lines[0]
    )
    assert re.fullmatch(
        r"soonest +20/20  loss 1.500  2.16 bits per byte  400 ms per step", lines[3]
    )


def test_on_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch):
    shown = show(monkeypatch, Terminal())
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "[Starting] ..." in plain
    assert "━" in plain
    assert re.search(r"soonest +━+ +20/20 +loss 1.500  2.16 bits per byte  400 ms", plain)
