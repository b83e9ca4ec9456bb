"""The list of changes fits the source as it is now, and its script tells what is noticed."""

from __future__ import annotations

import ast
import importlib.util
import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "mutants.py"
ROOMS = ("bench", "caffe", "cli", "core", "demo", "lab", "pycaffe", "report", "runtime")


def program() -> Any:
    spec = importlib.util.spec_from_file_location("mutants", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


mutants = program()
CHANGES = mutants.changes()


@pytest.mark.parametrize("change", CHANGES, ids=[change.name for change in CHANGES])
def test_a_change_can_be_made_in_one_place_and_is_tested_near_it(change: Any) -> None:
    text = (ROOT / "src" / "soonest" / change.file).read_text(encoding="utf-8")
    changed = change.apply(text)
    assert changed != text
    ast.parse(changed)
    assert (ROOT / shlex.split(change.tests)[0]).exists(), change.tests


def test_there_are_many_over_all_packages() -> None:
    assert len(CHANGES) >= 100
    assert len({change.name for change in CHANGES}) == len(CHANGES)
    rooms = Counter(change.file.split("/")[0] for change in CHANGES)
    assert all(rooms[room] >= 3 for room in ROOMS), rooms
    inner = {change.file.split("/")[1] for change in CHANGES if change.file.startswith("runtime/")}
    source = ROOT / "src" / "soonest" / "runtime"
    folders = {path.name for path in source.iterdir() if (path / "__init__.py").exists()}
    assert folders - inner <= {"device", "handle"}, "what these do shows in other rooms"


def test_a_text_that_is_not_there_or_there_twice_is_refused() -> None:
    change = mutants.Change("a.py", "wrong", "one", "two", "tests")
    assert change.apply("one three") == "two three"
    for text in ("three", "one one"):
        with pytest.raises(ValueError, match=r"a\.py: wrong: its old text occurs"):
            change.apply(text)


SOURCE = "def double(x):\n    return 2 * x\n\n\ndef forever():\n    return False\n"
TESTS = """
import os, sys
from soonest.part import double, forever

def test_double():
    assert double(2) == 4

def test_it_ends():
    while forever():
        pass
"""
LIST = """
[[part]]
file = "part.py"
tests = "tests/test_part.py"
changes = [
  ["a square", "2 * x", "x * x"],
  ["a triple", "2 * x", "3 * x"],
  ["an end", "return False", "return True"],
  ["broken from the start", "2 * x", "4 * x", "tests/test_broken.py"],
]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small repository."""
    (tmp_path / "src" / "soonest").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "benchmarks" / "records").mkdir(parents=True)
    (tmp_path / "src" / "soonest" / "__init__.py").write_text("")
    (tmp_path / "src" / "soonest" / "part.py").write_text(SOURCE)
    (tmp_path / "tests" / "test_part.py").write_text(TESTS)
    (tmp_path / "tests" / "test_broken.py").write_text("def test_it():\n    assert False\n")
    (tmp_path / "benchmarks" / "mutants.toml").write_text(LIST)
    short = PROGRAM.read_text()
    for usual, here in (
        ("_LEAST_S, _TIMES = 300.0, 8.0", "_LEAST_S, _TIMES = 5.0, 3.0"),
        ("importlib.import_module(name)", "pass"),
    ):
        assert usual in short
        short = short.replace(usual, here)
    (tmp_path / "benchmarks" / "mutants.py").write_text(short)
    return tmp_path


def run(root: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    """The script's exit code, what it says, and what it has found by change."""
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "mutants.py", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    record = root / "benchmarks" / "records" / "mutants.json"
    found = json.loads(record.read_text())["changes"].values() if record.exists() else ()
    return done.returncode, done.stdout + done.stderr, {one["change"]: one for one in found}


def test_what_is_noticed_is_told_from_what_goes_by(root: Path) -> None:
    code, said, found = run(root)
    assert code == 1
    assert {what: one["noticed"] for what, one in found.items()} == {
        "a square": False,  # 2 * 2 is 2 squared
        "a triple": True,
        "an end": True,
    }
    assert found["a triple"]["by"].endswith("test_part.py::test_double")
    assert found["an end"]["by"] == "they did not end"
    assert "NOT NOTICED  part.py: a square" in said
    assert "FAILS UNCHANGED  tests/test_broken.py" in said
    assert "2 noticed, 1 not" in said
    assert (root / "src" / "soonest" / "part.py").read_text() == SOURCE

    # What is known is not run again, unless it went by and is asked for.
    (root / "tests" / "test_part.py").write_text(TESTS.replace("double(2) == 4", "double(3) == 6"))
    code, said, found = run(root, "--only", "a ")
    assert (code, found["a square"]["noticed"]) == (1, False)
    assert "passes" not in said
    code, said, found = run(root, "--only", "a ", "--again")
    assert (code, found["a square"]["noticed"]) == (0, True)
    assert set(found) == {"a square", "a triple", "an end"}
