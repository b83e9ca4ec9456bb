"""``soonest lab``."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soonest.cli import main
from soonest.lab import registry, unavailable
from soonest.lab.registry import Entry, RunningLab, running_labs

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


@needs_lab
def test_hosts_may_send_at_other_rates_than_they_receive(capfd: pytest.CaptureFixture[str]):
    shapes = "tc qdisc show dev eth0 | grep -o 'rate [^ ]*'"
    assert main([*LAB[:-1], "--uplink", "5Mbit", "7Mbit", "--", "sh", "-c", shapes]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] rate 5Mbit", "[1] rate 7Mbit"]
    assert main([*LAB[:-1], "--uplink", "5Mbit", "--", "sh", "-c", shapes]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] rate 5Mbit", "[1] rate 5Mbit"]


def test_any_other_number_of_uplinks_is_code_2(capfd: pytest.CaptureFixture[str]):
    assert main([*LAB[:-1], "--uplink", "5mbit", "7mbit", "9mbit", "--", "true"]) == 2
    err = capfd.readouterr().err
    assert err == "soonest: 3 uplinks for 2 hosts: give one rate for all, or one each\n"


@pytest.fixture
def no_labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of running labs of this test's own."""
    monkeypatch.setattr(registry, "_folder", lambda: tmp_path / "soonest")
    return tmp_path


LINK = ["lab", "link", "--host", "1", "--rate", "5mbit"]


def test_without_a_lab_there_is_none_to_list_or_change(
    no_labs: Path, capfd: pytest.CaptureFixture[str]
):
    assert main(["lab", "list"]) == 0
    assert capfd.readouterr() == ("", "")
    assert main(LINK) == 2
    assert capfd.readouterr().err == "soonest: no lab runs here: start one with 'soonest lab run'\n"


def test_several_labs_are_listed_and_asked_for(no_labs: Path, capfd: pytest.CaptureFixture[str]):
    one, two = Entry([3, 4], 1e9, [1e9]), Entry([3, 4, 5], 318e6, [1e5, 1e5])
    one.note(["python", "a b.py"])
    assert main(["lab", "list"]) == 0
    first, second = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"1  1 host  1gbit  since [-0-9]+ [:0-9]+  python 'a b.py'", first)
    assert re.fullmatch(r"2  2 hosts  318mbit  since [-0-9]+ [:0-9]+  idle", second)
    assert main(LINK) == 2
    err = capfd.readouterr().err
    assert err == "soonest: several labs run: give --lab one of 1 (python 'a b.py'), 2 (idle)\n"
    assert main([*LINK, "--lab", "3"]) == 2
    assert "no lab 3 runs: give --lab one of 1 " in capfd.readouterr().err
    assert main([*LINK, "--lab", "1"]) == 2
    assert "no host 1: this lab has hosts 0 to 0" in capfd.readouterr().err
    two.close()
    assert main(LINK) == 2
    assert "no host 1" in capfd.readouterr().err
    one.close()


@pytest.mark.parametrize("words", [["--host", "1"], ["--host", "1", "--up", "--down"], ["--up"]])
def test_a_change_that_makes_no_sense_is_code_2(
    words: list[str], capfd: pytest.CaptureFixture[str]
):
    assert main(["lab", "link", *words]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.fixture
def running() -> Iterator[subprocess.Popen[str]]:
    """A lab of two hosts in another process, on which something runs."""
    command = [sys.executable, "-m", "soonest", *LAB, "sh", "-c", "echo ready; sleep 1000 & wait"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert {process.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
        yield process
        process.kill()


def lab_of(process: subprocess.Popen[str]) -> RunningLab | None:
    return next((lab for lab in running_labs() if lab.pid == process.pid), None)


def inside(lab: RunningLab, command: str, *, host: int = -1) -> str:
    """What a shell command says in the namespace of a lab's host, by default of its switch."""
    namespace = f"--net=/proc/{lab.pid}/fd/{lab.files[host]}"
    return subprocess.run(
        ["nsenter", namespace, "sh", "-c", command], capture_output=True, text=True, check=True
    ).stdout


@needs_lab
def test_a_link_of_a_running_lab_is_changed(running: subprocess.Popen[str]):
    lab = lab_of(running)
    assert lab is not None
    this = ["lab", "link", "--lab", str(lab.id), "--host", "1"]
    assert main([*this, "--rate", "5mbit"]) == 0
    shapes = inside(lab, "tc qdisc show dev port0; tc qdisc show dev port1")
    assert re.findall(r"rate (\w+)", shapes) == ["200Mbit", "5Mbit"]
    assert main([*this, "--down"]) == 0
    assert "state DOWN" in inside(lab, "ip link show port1")
    assert main([*this, "--up"]) == 0
    assert "state UP" in inside(lab, "ip link show port1")


@needs_lab
def test_ctrl_c_ends_all_and_is_code_130(running: subprocess.Popen[str]):
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert running.stderr is not None
    assert running.stderr.read() == "soonest: interrupted\n"
    assert lab_of(running) is None


@needs_lab
def test_a_lab_that_was_killed_is_off_the_list(running: subprocess.Popen[str]):
    lab = lab_of(running)
    assert lab is not None
    namespaces = {inside(lab, "readlink /proc/self/ns/net", host=n).strip() for n in range(2)}
    assert namespaces <= set(occupied_namespaces())
    running.kill()
    running.wait()
    assert lab_of(running) is None
    until_s = time.monotonic() + 20
    while namespaces & set(occupied_namespaces()):
        assert time.monotonic() < until_s
        time.sleep(0.05)


def occupied_namespaces() -> Iterator[str]:
    """The network namespaces that processes live in."""
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            yield str(path.readlink())
        except OSError:
            continue


@needs_lab
def test_check_says_what_links_carry(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    figures = tmp_path / "figures.json"
    assert main(["lab", "check", "--link", "10mbit", "50mbit", "--json", str(figures)]) == 0
    out, err = capfd.readouterr()
    assert err == "measuring 10mbit ...\nmeasuring 50mbit ...\n"
    head, *rows = [line.split() for line in out.splitlines()]
    assert head == ["asked", "carried", "payload", "share", "expected"]
    assert [(row[0], row[3]) for row in rows] == [("10mbit", "95.6%"), ("50mbit", "95.6%")]
    links = json.loads(figures.read_text())["links"]
    assert [link["asked_bps"] for link in links] == [10e6, 50e6]
    for link in links:
        assert link["share"] == link["payload_bps"] / link["asked_bps"]
        assert 0.7 < link["share"] / link["expected_share"] < 1.1
