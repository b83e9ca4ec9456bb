"""Damaged files of every format give a result or a sentence, and none is unpickled."""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "mutated_files.py"
FILES = 1000
_UNPICKLES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
_AMONG_RANKS = "runtime/comm/objects.py"
"""What the ranks of one job tell each other, as torch itself does."""


def _program() -> Any:
    spec = importlib.util.spec_from_file_location("mutated_files", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_damaged_file_crashes_hangs_or_takes_the_memory() -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--files", str(FILES)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 wrong") == 14


def _crashes(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raises(_: Path) -> None:
    raise TypeError("an error that is no sentence")


def _takes_memory(_: Path) -> None:
    bytearray(4 << 30)


@pytest.mark.parametrize(
    ("read", "said"),
    [(_crashes, "has ended with -9"), (_raises, "TypeError"), (_takes_memory, "MemoryError")],
)
def test_what_goes_wrong_is_seen(read: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def once_whole(path: Path) -> None:
        if path.read_text() != "whole":
            read(path)

    mutated_files = _program()
    form = mutated_files.Format("x", lambda path: path.write_text("whole"), once_whole)
    monkeypatch.setitem(mutated_files.FORMATS, "x", form)
    assert said in mutated_files.apart("x", 20, 0)[0]


def test_nothing_is_unpickled() -> None:
    for path in (ROOT / "src" / "soonest").rglob("*.py"):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), str(path).partition("soonest/")[2]
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import)]
        imported = {alias.name for node in imports for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & _UNPICKLES or name.endswith(_AMONG_RANKS), path
        called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not called & {"torch.load", "np.load", "numpy.load", "yaml.load"}, path


FOUND = {
    "caffemodel as HDF5": (15721, 57196),
    "solverstate as HDF5": (3493, 23223, 49765, 60035),
}
"""Files that once raised something else than a sentence, by the number that draws them."""


@pytest.mark.parametrize(("kind", "number"), [(k, n) for k, found in FOUND.items() for n in found])
def test_what_was_found_once_is_refused_in_words(kind: str, number: int, tmp_path: Path) -> None:
    program = _program()
    form, path = program.FORMATS[kind], tmp_path / program.FORMATS[kind].name
    form.write(path)
    path.write_bytes(program.mutated(random.Random(f"{kind} 0 {number}"), path.read_bytes()))
    with pytest.raises(ValueError, match=r"is no blob|as HDF5"):
        form.read(path)
