"""Pictures of nets, tables and pictures of logs."""

from __future__ import annotations

import csv
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import pytest

from helpers import golden_caffe as golden
from soonest.caffe.tools import draw_net
from soonest.cli import main

NET = """
layer { name: "d" type: "Input" top: "d" input_param { shape { dim: 1 dim: 2 dim: 8 dim: 8 } }
  include { phase: TEST } }
layer { name: "e" type: "DummyData" top: "d" dummy_data_param { shape { dim: 1 } }
  include { phase: TRAIN } }
layer { name: "c<1>" type: "Convolution" bottom: "d" top: "c"
  convolution_param { num_output: 7 kernel_size: 3 pad: 1 } }
layer { name: "relu" type: "ReLU" bottom: "c" top: "c" }
layer { name: "p" type: "Pooling" bottom: "c" top: "p" pooling_param { pool: AVE kernel_size: 2 } }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(NET)
    return tmp_path


@pytest.mark.parametrize("rankdir", ["LR", "TB"])
def test_a_net_is_drawn_without_graphviz(rankdir: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["caffe", "draw_net", "--rankdir", rankdir, "net.prototxt", "net.svg"]) == 0
    root = ET.parse("net.svg").getroot()
    texts = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    for wanted in ("d", "(Input)", "c<1>", "kernel size: 3", "pad: 1", "7", "AVE of 2"):
        assert wanted in texts
    boxes = [
        [float(box.get(name, 0)) for name in ("x", "y", "width", "height")]
        for box in root.iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert len(boxes) == 5 + 3
    size = [float(root.get(name, 0)) for name in ("width", "height")]
    for number, (x, y, width, height) in enumerate(boxes):
        assert min(x, y) >= 0
        assert x + width <= size[0]
        assert y + height <= size[1]
        for u, v, wide, high in boxes[:number]:
            assert x >= u + wide or u >= x + width or y >= v + high or v >= y + height


def test_a_phase_can_be_chosen_and_other_kinds_need_graphviz(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["caffe", "draw_net", "--phase", "TEST", "net.prototxt", "net.dot"]) == 0
    dot = Path("net.dot").read_text()
    assert dot.startswith("digraph")
    assert "(DummyData)" not in dot
    assert dot.count("->") == 6
    assert main(["caffe", "draw_net", "net.prototxt", "net.png"]) == 2
    assert "install graphviz" in capsys.readouterr().err


def test_graphviz_draws_if_it_is_there(monkeypatch: pytest.MonkeyPatch, folder: Path):
    stand_in = folder / "bin" / "dot"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\necho "drawn $1"; cat\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:/usr/bin:/bin")
    draw_net.draw("net.prototxt", "net.pdf")
    assert Path("net.pdf").read_text().startswith("drawn -Tpdf\ndigraph")


LOG = """\
I1231 23:59:58.000000  1234 solver.cpp:293] Solving small
I1231 23:59:58.100000  1234 solver.cpp:294] Learning Rate Policy: step
I1231 23:59:58.500000  1234 solver.cpp:351] Iteration 0, Testing net (#0)
I1231 23:59:59.000000  1234 solver.cpp:418]     Test net output #0: accuracy = 0.25
I1231 23:59:59.000000  1234 solver.cpp:418]     Test net output #1: loss = 1.5 (* 1 = 1.5 loss)
I1231 23:59:59.500000  1234 solver.cpp:239] Iteration 0 (-1 iter/s, 0.1s/2 iters), loss = 1.6
I1231 23:59:59.500000  1234 solver.cpp:258]     Train net output #0: loss = 1.625 (* 1 = 1.625 loss)
I1231 23:59:59.600000  1234 sgd_solver.cpp:112] Iteration 0, lr = 0.1
I0101 00:00:02.000000  1234 solver.cpp:239] Iteration 2 (1 iter/s, 2s/2 iters), loss = 1.2
I0101 00:00:02.000000  1234 solver.cpp:258]     Train net output #0: loss = 1e-05 (* 1 = 1e-05 loss)
I0101 00:00:02.100000  1234 sgd_solver.cpp:112] Iteration 2, lr = 0.01
I0101 00:00:03.000000  1234 solver.cpp:351] Iteration 3, Testing net (#0)
I0101 00:00:03.500000  1234 solver.cpp:418]     Test net output #0: accuracy = 0.75
I0101 00:00:03.500000  1234 solver.cpp:418]     Test net output #1: loss = 0.5 (* 1 = 0.5 loss)
"""


def table(path: str) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_a_log_becomes_tables_and_a_picture():
    Path("caffe.log").write_text(LOG)
    Path("out").mkdir()
    assert main(["caffe", "parse_log", "caffe.log", "out"]) == 0
    assert table("out/caffe.log.train") == [
        {"NumIters": 0, "Seconds": 1.5, "LearningRate": 0.1, "loss": 1.625},
        {"NumIters": 2, "Seconds": 4.0, "LearningRate": 0.01, "loss": 1e-05},
    ]
    assert table("out/caffe.log.test") == [
        {"NumIters": 0, "Seconds": 1.0, "LearningRate": 0.1, "accuracy": 0.25, "loss": 1.5},
        {"NumIters": 3, "Seconds": 5.5, "LearningRate": 0.01, "accuracy": 0.75, "loss": 0.5},
    ]
    picture = cv2.imread("out/caffe.log.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0


def test_a_log_of_ours_is_read_as_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    source = golden.FOLDER / "solvers"
    for name in ("sgd_step", *(one.name for one in source.glob("*_lmdb"))):
        shutil.copytree(source / name, folder / name)
    monkeypatch.chdir(folder / "sgd_step")
    assert main(["caffe", "train", "--solver=solver.prototxt", "--weights=init.caffemodel"]) == 0
    Path("ours.log").write_text(capfd.readouterr().err)
    assert main(["caffe", "parse_log", "--delimiter", ",", "ours.log", "."]) == 0
    rows = table("ours.log.train")
    assert len(rows) > 1
    assert rows[0]["NumIters"] == 0
    assert all(row["LearningRate"] > 0 for row in rows)


def test_what_is_no_log_is_refused(capsys: pytest.CaptureFixture[str]):
    Path("x.log").write_text("hello")
    assert main(["caffe", "parse_log", "x.log", "."]) == 2
    assert "no line of a training" in capsys.readouterr().err
