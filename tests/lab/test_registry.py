"""Which labs run on this machine."""

import json
import os
import subprocess
import sys
import time

import pytest

from soonest.lab import registry
from soonest.lab.registry import Entry, running_labs

HOLD = """
import pathlib, sys, time
from soonest.lab import registry
registry._folder = lambda: pathlib.Path(sys.argv[1])
entry = registry.Entry([7, 8], 1e6, [1e6])
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "soonest"
    monkeypatch.setattr(registry, "_folder", lambda: path)
    return path


@pytest.fixture
def other(folder):
    """Another process with a lab."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def ids():
    return [lab.id for lab in running_labs()]


def test_a_lab_is_listed_while_it_runs(folder):
    assert running_labs() == []
    entry = Entry([3, 4, 5], 1e9, [1e9, 2e9])
    entry.note(["python", "x.py"])
    [lab] = running_labs()
    assert (lab.id, lab.hosts, lab.pid) == (1, 2, os.getpid())
    assert (lab.link_bps, lab.uplinks_bps, lab.command) == (1e9, [1e9, 2e9], ["python", "x.py"])
    assert 0 <= time.time() - lab.since_s < 60
    entry.note(["true"])
    assert [lab.command for lab in running_labs()] == [["true"]]
    entry.close()
    assert running_labs() == []
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_numbers_are_used_again_once_they_are_free(folder):
    one, two = Entry([3, 4], 1e9, [1e9]), Entry([3, 4], 1e9, [1e9])
    assert ids() == [1, 2]
    one.close()
    three = Entry([3, 4], 1e9, [1e9])
    assert ids() == [1, 2]
    three.close()
    two.close()


def test_what_a_killed_lab_left_is_removed_at_the_next_start_and_not_before(folder, other):
    assert ids() == [1]
    other.kill()
    other.wait()
    assert ids() == []
    assert (folder / "lab-1.json").exists()
    entry = Entry([3, 4, 5], 1e9, [1e9, 1e9])
    assert [(lab.id, lab.pid) for lab in running_labs()] == [(1, os.getpid())]
    entry.close()


def test_the_entry_of_a_lab_that_runs_is_left_alone(folder, other):
    before = (folder / "lab-1.json").read_text()
    assert json.loads(before)["pid"] == other.pid
    Entry([3, 4], 1e9, [1e9]).close()
    assert (folder / "lab-1.json").read_text() == before
    assert ids() == [1]


def test_what_a_lab_was_killed_over_while_writing_is_no_lab(folder):
    folder.mkdir()
    (folder / "lab-1.json").write_text('{"id": 1, "pi')
    assert ids() == []
    Entry([3, 4], 1e9, [1e9]).close()


def test_a_process_forked_from_a_lab_does_not_keep_it_listed(folder):
    entry = Entry([3, 4], 1e9, [1e9])
    process = os.fork()
    if process == 0:
        time.sleep(100)
        os._exit(0)
    entry.close()
    assert ids() == []
    os.kill(process, 9)
    os.waitpid(process, 0)


def test_a_folder_that_cannot_be_used_is_named(folder):
    folder.write_text("not a folder")
    with pytest.raises(RuntimeError, match=f"{folder}.*remove it"):
        running_labs()
