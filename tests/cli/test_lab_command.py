"""``soonest lab run``."""

import pytest

from soonest.cli import main
from soonest.lab import unavailable

WHY_NOT = unavailable()
needs_lab = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
LAB = ["lab", "run", "--hosts", "2", "--link", "200mbit", "--"]


@needs_lab
def test_it_runs_a_command_on_every_host(capfd: pytest.CaptureFixture[str]):
    assert main([*LAB, "sh", "-c", "echo $RANK of $WORLD_SIZE -- $0", "--"]) == 0
    out = capfd.readouterr().out
    assert sorted(out.splitlines()) == ["[0] 0 of 2 -- --", "[1] 1 of 2 -- --"]


@needs_lab
def test_the_code_of_the_rank_that_failed_first_is_returned(capfd: pytest.CaptureFixture[str]):
    assert main([*LAB, "sh", "-c", "[ $RANK = 0 ] && sleep 100 || exit 3"]) == 3
    assert capfd.readouterr().err == "soonest: rank 1 failed first, with exit code 3\n"


@needs_lab
def test_an_unknown_command_is_code_2(capfd: pytest.CaptureFixture[str]):
    assert main([*LAB, "no-such-command"]) == 2
    assert "no command 'no-such-command'" in capfd.readouterr().err


def test_where_it_cannot_run_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("soonest.lab.unavailable", lambda: "the lab needs root: run as root")
    assert main([*LAB, "true"]) == 2
    assert capfd.readouterr().err == "soonest: the lab needs root: run as root\n"
