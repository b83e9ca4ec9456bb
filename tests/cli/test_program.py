"""The command line: exit codes, and one line that says what is wrong."""

import subprocess
import sys

import pytest

from soonest import SoonestError
from soonest.cli import main
from soonest.cli.request import FailedError, WrongRequestError

RATE = ["--link", "200mbit"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "required: COMMAND"),
        (["nosuch"], "invalid choice: 'nosuch'"),
        (["demo", "--steps", "many"], "'many' is not a whole number"),
        (["demo", "--steps", "1"], "1 is too few: give 2 or more"),
        (["demo", "--link", "fast"], "'fast' is no rate"),
        (["demo", "--link", "1gbit", "--loopback"], "not allowed with"),
        (["demo", "--json", "/"], "/ is a folder"),
        (["demo", "--json", "no/such/folder/x.json"], "no folder no/such/folder"),
        (["demo", "--nosuch"], "unrecognized arguments: --nosuch"),
        (["lab"], "required: COMMAND"),
        (["lab", "run", "--hosts", "2", *RATE], "no command to run"),
        (["lab", "run", "--hosts", "2", *RATE, "--"], "no command to run"),
        (["lab", "run", "--hosts", "0", *RATE, "--", "true"], "0 is too few"),
        (["lab", "run", "--hosts", "2", "--link", "9", "--", "true"], "rate"),
        (["lab", "run", *RATE, "--", "true"], "required: --hosts"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("soonest: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WrongRequestError("so\n  not"), 2),
        (FailedError("so\n  not"), 1),
        (SoonestError("so\n  not"), 1),
    ],
)
def test_errors_become_one_line_and_a_code(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("soonest.cli.lab.run", fail)
    assert main(["lab", "run", "--hosts", "1", *RATE, "--", "true"]) == code
    assert capsys.readouterr().err == "soonest: so not\n"


def test_ctrl_c_is_one_line_and_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("soonest.cli.lab.run", interrupt)
    assert main(["lab", "run", "--hosts", "1", *RATE, "--", "true"]) == 130
    assert capsys.readouterr().err == "soonest: interrupted\n"


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["lab", "run", "--help"]])
def test_help_is_no_error(argv: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(argv) == 0
    assert "usage: soonest" in capsys.readouterr().out


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "soonest", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("soonest ")


def test_the_command_starts_without_torch():
    script = (
        "import sys; from soonest.cli import main; "
        "assert main(['demo', '--steps', '0']) == main(['demo', '--link', 'fast']) == 2; "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "soonest.cli.demo" in loaded
    assert not {"torch", "matplotlib", "rich"} & set(loaded)


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = subprocess.run(
        [sys.executable, "-m", "soonest", "env"],
        stdout=reader.stdin,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
