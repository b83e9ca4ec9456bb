"""The scripts in ``examples/pycaffe`` run as ``docs/caffe.md`` says, one after the other."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2

ROOT = Path(__file__).parents[2]


def documented() -> list[list[str]]:
    """The lines of the page that run a script."""
    page = (ROOT / "docs" / "caffe.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    python (-m soonest\.pycaffe .+)$", page, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_scripts_run_as_documented(tmp_path: Path):
    shutil.copytree(ROOT / "examples" / "pycaffe", tmp_path, dirs_exist_ok=True)
    commands = documented()
    assert [command[2] for command in commands] == ["finetune.py", "classify.py", "loss_curves.py"]
    said = ""
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout
    shares = dict(re.findall(r"^(.*): (\d+)%$", said, re.MULTILINE))
    assert int(shares["three kinds, before"]) < 70
    assert int(shares["three kinds, after"]) > 85
    assert re.search(r"^[01]\.\d+ cross\n", said, re.MULTILINE)
    assert said.index(" cross\n") < said.index(" disc\n")
    losses = re.findall(r"^(\w+): ([\d.]+) at first, ([\d.]+) at the end$", said, re.MULTILINE)
    assert [name for name, *_ in losses] == ["SGD", "Adam"]
    assert all(float(last) < float(first) for _, first, last in losses)
    assert cv2.imread(str(tmp_path / "loss.png")).std() > 0
