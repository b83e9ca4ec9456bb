"""Caffe's companion programs: what they write, and what they say, is what Caffe's did."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest

from helpers import golden_caffe as golden
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message
from soonest.caffe.tools import convert_imageset
from soonest.caffe.tools.progress import tracked
from soonest.cli import main

FOLDER = golden.SECOND / "tools"
CASES = {
    name: case
    for name, case in golden.index("index.json", FOLDER)["cases"].items()
    if not case["command"][0].startswith("caffe")
}


def run(case: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    shutil.copytree(FOLDER / case["folder"], folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    return main(["caffe", *case["command"]])


@pytest.mark.parametrize("name", CASES)
def test_a_tool_does_what_caffes_did(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    case = CASES[name]
    assert run(case, tmp_path, monkeypatch) == case["exit_status"]
    said = [line.partition("] ")[2] for line in capfd.readouterr().err.splitlines()]
    for line in case.get("lines", []):
        assert any(_alike(line, one) or line in one for one in said), (line, said)
    for output, wanted in case["outputs"].items():
        if "records" in wanted:
            _compare_records(output, wanted)
        elif wanted["kind"] == "prototxt":
            assert Path(output).read_text() == Path(wanted["file"]).read_text()
        else:
            type_name = "BlobProto" if wanted["kind"] == "binaryproto" else "NetParameter"
            found, theirs = (
                wire.decode(Path(path).read_bytes(), type_name) for path in (output, wanted["file"])
            )
            assert found == theirs


def _alike(wanted: str, found: str) -> bool:
    """Whether lines are equal, numbers in them within what float32 gives."""
    number = r"-?[0-9]+\.[0-9]+(?:e[+-]?[0-9]+)?"
    pairs = zip(re.findall(number, wanted), re.findall(number, found), strict=False)
    return re.sub(number, "#", wanted) == re.sub(number, "#", found) and all(
        abs(float(a) - float(b)) <= 1e-5 * max(1, abs(float(a))) for a, b in pairs
    )


def records(path: str, kind: str) -> dict[str, bytes]:
    if kind == "lmdb":
        with lmdb.open(path, readonly=True, lock=False) as base, base.begin() as transaction:
            return {key.decode(): value for key, value in transaction.cursor()}
    import plyvel

    base = plyvel.DB(path)
    try:
        return {key.decode(): value for key, value in base}
    finally:
        base.close()


def _compare_records(output: str, wanted: dict[str, Any]) -> None:
    found = records(output, wanted["kind"])
    expected = json.loads(Path(wanted["records"]).read_text())
    arrays = np.load(wanted["arrays"])
    assert list(found) == [record["key"] for record in expected]
    for number, record in enumerate(expected):
        datum = wire.decode(found[record["key"]], "Datum")
        for name in ("channels", "height", "width"):
            assert (getattr(datum, name) if datum.has(name) else None) == record[name]
        assert datum.label == record["label"]
        assert datum.encoded == bool(record["encoded"])
        _compare_values(datum, number, arrays)


def _compare_values(datum: Message, number: int, arrays: Any) -> None:
    if f"pixels_{number}" in arrays.files:
        image = cv2.imdecode(np.frombuffer(datum.data, np.uint8), cv2.IMREAD_UNCHANGED)
        wanted = arrays[f"pixels_{number}"]
        assert image.size == wanted.size
        assert np.array_equal(image, wanted) or np.array_equal(image.transpose(2, 0, 1), wanted)
    elif f"float_{number}" in arrays.files:
        wanted = arrays[f"float_{number}"]
        found = np.asarray(datum.float_data, np.float32)
        assert np.abs(found - wanted.reshape(-1)).max() <= 1e-5 * max(1, np.abs(wanted).max())
    else:
        assert datum.data == arrays[f"data_{number}"].astype(np.uint8).tobytes()


def test_a_bar_is_shown_to_who_looks_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    assert list(tracked(range(3), "Counting", 3)) == [0, 1, 2]
    assert written.getvalue() == ""
    monkeypatch.setattr(written, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert list(tracked(range(3), "Counting", 3)) == [0, 1, 2]
    assert "Counting" in written.getvalue()
    assert "100%" in written.getvalue()


def test_records_are_written_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convert_imageset, "TOGETHER", 2)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "list.txt").write_text("a.png 1\n" * 5)
    said: list[str] = []
    convert_imageset.convert(
        f"{tmp_path}/",
        str(tmp_path / "list.txt"),
        str(tmp_path / "base"),
        convert_imageset.Settings(shuffle=True),
        say=said.append,
    )
    assert len(records(str(tmp_path / "base"), "lmdb")) == 5
    assert [line for line in said if line.startswith("Processed")] == [
        f"Processed {count} files." for count in (2, 4, 5)
    ]


WRONG = {
    "convert_imageset --resize_width=3 ./ list.txt new": "both --resize_height",
    "convert_imageset ./ list.txt there": "there is there already",
    "convert_imageset ./ none.txt new": "cannot read none.txt",
    "convert_imageset ./ bad.txt new": "bad.txt:1: a line is a path, a space, a label",
    "convert_imageset --encode_type=docx ./ list.txt new": "of the type 'docx'",
    "convert_imageset --check_size ./ two.txt new": "b.png has 27 values, those before 12",
    "compute_image_mean none": "no data base none",
    "extract_features none.caffemodel net.prototxt x y 1 lmdb": "none.caffemodel",
    "extract_features w.caffemodel net.prototxt x,z y 1 lmdb": "2 blobs and 1 data bases",
    "extract_features w.caffemodel net.prototxt z y 1 lmdb": "no blob 'z': it has x",
    "upgrade_net_proto_text net.prototxt none/new": "cannot write none/new",
    "upgrade_solver_proto_text net.prototxt new": "SolverParameter",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_said(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("a.png", np.zeros((2, 2, 3), np.uint8))
    cv2.imwrite("b.png", np.zeros((3, 3, 3), np.uint8))
    Path("there").mkdir()
    Path("list.txt").write_text("a.png 1\n")
    Path("two.txt").write_text("a.png 1\nb.png 2\n")
    Path("bad.txt").write_text("a.png\n")
    Path("w.caffemodel").write_bytes(wire.encode(Message("NetParameter", name="w")))
    Path("net.prototxt").write_text(
        'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 1 } } }'
    )
    assert main(["caffe", *words.split()]) == 2
    assert WRONG[words] in capsys.readouterr().err
