"""The text format: what is read, what is refused and where, and that writing is its inverse."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import golden_caffe as golden
from helpers.caffe_strategies import messages
from soonest.caffe.proto import text
from soonest.caffe.proto.message import Message
from soonest.caffe.proto.text import TextError, parse


def net(source: str) -> Message:
    return parse(source, "NetParameter", file="net.prototxt")


STYLES = """
name: 'quick'  # a comment } with { marks
layer { name: "conv", type: "Convolution"; bottom: "da" 'ta' top: "conv"
  param: < lr_mult: 1.5f > param { lr_mult: .5e1, decay_mult: 0 },
  propagate_down: [true, 0, f]
  convolution_param { num_output: 0x10 kernel_size: [3, 5] pad: 010 engine: 2
    weight_filler: { type: "gaussian" std: 1e-2 mean: -inf } } }
layer { type: "a\\n\\x41\\101\\u00e9\\"" pooling_param { pool: AVE } }
"""


def test_every_style_of_writing_is_read():
    first, second = net(STYLES).layer
    assert net(STYLES).name == "quick"
    assert first.bottom == ["data"]
    assert [one.lr_mult for one in first.param] == [1.5, 5]
    assert [one.decay_mult for one in first.param] == [1, 0]
    assert first.propagate_down == [True, False, False]
    convolution = first.convolution_param
    assert (convolution.num_output, list(convolution.kernel_size)) == (16, [3, 5])
    assert (list(convolution.pad), convolution.engine) == ([8], "CUDNN")
    assert convolution.weight_filler.std == pytest.approx(0.01)
    assert convolution.weight_filler.mean == -math.inf
    assert second.type == 'a\nAAé"'
    assert second.pooling_param.pool == "AVE"
    assert [first.line, second.line, convolution.line] == [3, 8, 6]


def test_what_is_absent_reads_as_its_default():
    empty = net("")
    assert (empty.name, empty.force_backward, empty.layer) == ("", False, [])
    assert not empty.has("state")
    assert empty.state.phase == "TEST"
    assert not empty.has("state")
    assert Message("SolverParameter").delta == pytest.approx(1e-8)
    assert Message("SolverParameter").snapshot_format == "BINARYPROTO"


WRONG = {
    'name: "a"\nlayers: 3': (2, 9, "expected '{'"),
    "layer {\n  nam: 1\n}": (2, 3, "LayerParameter has no field 'nam'"),
    'layer { name: "a"\nlayer { }': (2, 1, "is a bracket not closed?"),
    "layer {\n\n": (3, 1, "starts in line 1: close it with '}'"),
    "layer < }": (1, 9, "expected '>'"),
    "}": (1, 1, "closes nothing"),
    'name "a"': (1, 6, "expected ':'"),
    'name: "a': (1, 7, "does not end"),
    'name: "\\q"': (1, 7, "no escape"),
    'name: "C:\\Users"': (1, 7, "write / or"),
    '\ufeffname: "a"': (1, 1, "byte order mark"),
    "layer { pooling_param { ceil_mode: true } }": (1, 25, "BVLC's word is round_mode"),
    'name: "\\351\udce9" nam: 1': (1, 15, "has no field 'nam'"),
    'name: "\\777"': (1, 7, "no escape"),
    'name: "\\ud800"': (1, 7, "no escape"),
    'name: "a" name: "b"': (1, 17, "given twice"),
    "name: a": (1, 7, "expected text in quotes"),
    "input_dim: 1.5": (1, 12, "expected a whole number"),
    "input_dim: 12a": (1, 12, "cannot read"),
    "input_dim: 3000000000": (1, 12, "out of range"),
    f"input_dim: {'9' * 5000}": (1, 12, "expected a whole number"),
    "input_dim: 089": (1, 12, "expected a whole number"),
    "input_dim: [1, 2": (1, 17, "expected ','"),
    "input_dim: [1, ]": (1, 16, "expected a whole number"),
    "force_backward: maybe": (1, 17, "expected true or false"),
    "state { phase: DEPLOY }": (1, 16, "expected one of TRAIN, TEST"),
    "state { phase: 7 }": (1, 16, "expected one of TRAIN, TEST"),
    "layer { loss_weight: much }": (1, 22, "expected a number"),
    "layer { clip_param { min: 0 } }": (1, 20, "a field 'max' is needed here"),
    "name: \u00fc": (1, 7, "cannot read"),
    "[extension]: 1": (1, 2, "expected the name"),
}


@pytest.mark.parametrize("source", WRONG)
def test_what_is_wrong_is_said_with_its_place(source: str):
    line, column, what = WRONG[source]
    with pytest.raises(TextError) as caught:
        net(source)
    assert str(caught.value).startswith(f"net.prototxt:{line}:{column}: ")
    assert (caught.value.line, caught.value.column) == (line, column)
    assert what in str(caught.value)


def test_deep_and_long_texts_neither_crash_nor_take_long():
    began = time.perf_counter()
    for source in (
        "layer { " * 100_000,
        "layer <" * 100_000,
        "[" * 1_000_000,
        "# " * 1_000_000 + "\n?",
        '"' * 1_000_001,
        'name: "' + "\\" * 1_000_001,
        "name: " + '"a"' * 200_000 + " {",
        "input_dim: " + "1" * 1_000_000,
        "layer { loss_weight: 1" + "e" * 1_000_000,
        " " * 1_000_000 + "\n" * 100_000 + "?",
    ):
        with pytest.raises(TextError):
            net(source)
    assert time.perf_counter() - began < 60


def test_more_values_than_any_net_has_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("soonest.caffe.proto.text.outline.MOST_VALUES", 100)
    for one in ("layer { } ", 'input: "" '):
        net(one * 100)
        with pytest.raises(TextError, match="more than 100 values"):
            net(one * 101)


@given(messages("NetParameter"))
@settings(max_examples=60)
def test_writing_is_the_inverse_of_reading(message: Message):
    assert parse(text.write(message), "NetParameter") == message


PIECES = st.sampled_from(
    ["layer", "{", "}", "<", ">", ":", "[", "]", ",", ";", "-", "name", '"a"', "'", '"', "1", "1.5",
     "true", "TRAIN", "state", "phase", "#", "\n", "\\", "input_dim", "inf", "0x", "\x00", "é"]
)  # fmt: skip


def _error(source: str) -> TextError | None:
    """Why a text is refused; if it is not, it can be written and read again."""
    try:
        found = net(source)
    except TextError as error:
        return error
    assert text.write(net(text.write(found))) == text.write(found)
    return None


@given(st.lists(PIECES, max_size=30).map(" ".join) | st.text(max_size=60))
@settings(max_examples=300)
def test_any_text_is_read_or_refused_with_a_place_in_it(source: str):
    error = _error(source)
    if error is not None:
        lines = source.split("\n")
        assert 1 <= error.line <= len(lines)
        assert 1 <= error.column <= len(lines[error.line - 1]) + 1


@given(messages("NetParameter"), st.data())
@settings(max_examples=100)
def test_damaged_texts_are_read_or_refused(message: Message, data: st.DataObject):
    source = text.write(message)
    at = data.draw(st.integers(0, len(source)))
    source = source[:at] + data.draw(st.sampled_from(["", "}", "{", '"', "-", "x: "])) + source[
        at + data.draw(st.integers(0, 3)) :
    ]  # fmt: skip
    error = _error(source)
    assert error is None or 1 <= error.line <= source.count("\n") + 1


def test_bytes_that_are_no_utf8_survive():
    raw = b'name: "caf\xe9"  # \xff\xfe'
    assert b"\\351" in text.write(parse(raw, "NetParameter")).encode()


def test_every_golden_definition_is_read_and_those_that_caffe_refuses_are_refused():
    refused: dict[str, int] = {}
    paths = sorted(golden.FOLDER.rglob("*.prototxt"))
    assert len(paths) > 100
    for path in paths:
        type_name = "SolverParameter" if "solver" in path.name else "NetParameter"
        try:
            found = parse(path.read_bytes(), type_name, file=path.name)
        except TextError as error:
            refused[path.name] = error.line
        else:
            assert parse(text.write(found), type_name) == found
    assert refused == {
        "bad_enum.net.prototxt": 5,
        "solver_unknown_field.solver.prototxt": 2,
        "string_for_number.net.prototxt": 6,
        "unclosed_brace.net.prototxt": 6,
        "unknown_field.net.prototxt": 3,
    }


WITHOUT = """
import sys
sys.modules["google.protobuf"] = None
from soonest.caffe.solver.solvers import SGD
from soonest.cli import main
raise SystemExit(main(["caffe", "time", "--model=net.prototxt"]))
"""


def test_without_protobuf_a_sentence_says_how_to_get_it(tmp_path: Path):
    (tmp_path / "net.prototxt").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.endswith("need protobuf: pip install 'soonest[caffe]'\n")
