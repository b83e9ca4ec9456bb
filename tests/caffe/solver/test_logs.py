"""What is said while real Caffe says it: lines of ``train`` and ``test``, and files of a net."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from helpers import golden_caffe as golden
from soonest.cli import main

FOLDER = golden.SECOND / "logs"
CASES = golden.index("logs/index.json", golden.SECOND)["cases"]
GLOG = re.compile(r"I\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ \S+:\d+\] (.*)")
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


@pytest.mark.parametrize("name", CASES)
def test_a_command_says_what_caffe_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    case = CASES[name]
    shutil.copytree(FOLDER / case["folder"], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.h5").unlink(missing_ok=True)
    assert main(case["command"]) == 0
    lines = [match[1] for match in map(GLOG.match, capsys.readouterr().err.splitlines()) if match]
    lines = [re.sub(r"\(\S+ iter/s, \S+s/", "(# iter/s, #s/", line) for line in lines]
    lines = [line for line in lines if line not in ("Use CPU.", "Starting Optimization")]
    lines = [line for line in lines if not line.startswith("Snapshotting")]
    wanted = case["lines"]
    assert [NUMBER.sub("N", line) for line in lines] == [NUMBER.sub("N", line) for line in wanted]
    for mine, theirs in zip(lines, wanted, strict=True):
        for a, b in zip(NUMBER.findall(mine), NUMBER.findall(theirs), strict=True):
            assert float(a) == pytest.approx(float(b), rel=2e-5, abs=1e-6), theirs
    if "hdf5" in case:
        arrays = np.load(case["hdf5"]["arrays"])
        with h5py.File(case["hdf5"]["file"]) as file:
            assert set(file) == set(arrays.files)
            for key in arrays.files:
                assert file[key].shape == arrays[key].shape
                np.testing.assert_allclose(file[key][()], arrays[key], rtol=1e-5, atol=1e-5)


def test_an_output_of_several_shapes_is_said_but_has_no_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(golden.SECOND / "data" / "images_sizes_gray", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.caffemodel").write_bytes(b"\x0a\x01x")
    words = ["--model=net.prototxt", "--weights=none.caffemodel", "--iterations=3"]
    assert main(["caffe", "test", *words]) == 0
    err = capsys.readouterr().err
    assert "lrn has several shapes, so it has no mean" in err
    lines = [match[1] for match in map(GLOG.match, err.splitlines()) if match]
    sums = [float(line.split(" = ")[1]) for line in lines if line.startswith("Batch ")
            and "sum" in line]  # fmt: skip
    assert float(lines[-1].removeprefix("sum = ")) == pytest.approx(np.mean(sums), rel=1e-5)
