"""``soonest caffe``: train, test, time, and what is said where that cannot be."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from helpers import golden_caffe as golden
from soonest.caffe.io import solver_state
from soonest.cli import main

NET = """
name: "tiny"
layer { name: "d" type: "DummyData" top: "x" top: "y"
  dummy_data_param { shape { dim: 4 dim: 1 dim: 6 dim: 6 } shape { dim: 4 }
    data_filler { type: "gaussian" } data_filler { } } }
layer { name: "c" type: "Convolution" bottom: "x" top: "c"
  convolution_param { num_output: 2 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "r" type: "ReLU" bottom: "c" top: "c" }
layer { name: "f" type: "InnerProduct" bottom: "c" top: "f"
  inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "hit" type: "Accuracy" bottom: "f" bottom: "y" top: "hit" include { phase: TEST } }
layer { name: "l" type: "SoftmaxWithLoss" bottom: "f" bottom: "y" top: "l" }
"""
SOLVER = """
net: "net.prototxt" base_lr: 0.1 lr_policy: "fixed" momentum: 0.9 max_iter: {iterations} display: 2
test_iter: 2 test_interval: 2 snapshot_prefix: "run" random_seed: 1 average_loss: 2
"""
GLOG = re.compile(r"I\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ \S+:\d+\] (.*)")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(NET)
    Path("solver.prototxt").write_text(SOLVER.replace("{iterations}", "4"))
    Path("long.prototxt").write_text(SOLVER.replace("{iterations}", "1000000"))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    matches = [GLOG.fullmatch(line) for line in err.splitlines()]
    assert all(matches), err
    return [match[1] for match in matches if match]


@pytest.mark.usefixtures("folder")
def test_train_says_what_caffe_says_and_goes_on_from_a_state(capsys: pytest.CaptureFixture[str]):
    assert main(["caffe", "train", "--solver=solver.prototxt", "--gpu", "all"]) == 0
    lines = said(capsys)
    shapes = [re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "N", line) for line in lines]
    assert shapes == [
        "Use CPU. GPUs are not supported: --gpu is not used.",
        "Starting Optimization", "Solving tiny", "Learning Rate Policy: fixed",
        *(["Iteration N, Testing net (#N)", "    Test net output #N: hit = N",
           "    Test net output #N: l = N (* N = N loss)",
           "Iteration N (N iter/s, Ns/N iters), loss = N",
           "    Train net output #N: l = N (* N = N loss)", "Iteration N, lr = N"] * 2),
        "Snapshotting to binary proto file run_iter_N.caffemodel",
        "Snapshotting solver state to binary proto file run_iter_N.solverstate",
        "Iteration N, loss = N", "Iteration N, Testing net (#N)", "    Test net output #N: hit = N",
        "    Test net output #N: l = N (* N = N loss)", "Optimization Done.", "Optimization Done.",
    ]  # fmt: skip
    assert solver_state.read("run_iter_4.solverstate").iteration == 4
    assert main(["caffe", "train", "-solver", "solver.prototxt", "-snapshot",
                 "run_iter_4.solverstate"]) == 0  # fmt: skip
    assert said(capsys)[:2] == ["Use CPU.", "Resuming from run_iter_4.solverstate"]
    weights = ["--weights=run_iter_4.caffemodel", "--iterations=3"]
    assert main(["caffe", "test", "--model=net.prototxt", *weights]) == 0
    lines = said(capsys)
    assert lines[:2] == ["Use CPU.", "Running for 3 iterations."]
    assert lines[-2].startswith("hit = ")
    assert re.fullmatch(r"l = \S+ \(\* 1 = \S+ loss\)", lines[-1])
    assert sum(line.startswith("Batch ") for line in lines) == 6


@pytest.mark.usefixtures("folder")
def test_time_measures_each_layer(capsys: pytest.CaptureFixture[str]):
    assert main(["caffe", "time", "--model=net.prototxt", "--iterations=2"]) == 0
    lines = said(capsys)
    assert re.fullmatch(r"Initial loss: \d\S+", lines[2])
    assert sum("\tforward: " in line for line in lines) == 5
    assert sum("\tbackward: " in line for line in lines) == 5
    assert any(line.startswith("Average Forward-Backward: ") for line in lines)


@pytest.mark.usefixtures("folder")
def test_stages_of_the_command_are_added_to_those_of_the_solver(
    capsys: pytest.CaptureFixture[str],
):
    rules = 'include { min_level: 2 stage: "a" stage: "b" stage: "c" }'
    Path("net.prototxt").write_text(NET.replace('"l" type: "Soft', f'"l" {rules} type: "Soft'))
    with Path("solver.prototxt").open("a") as file:
        file.write('train_state { stage: "a" level: 2 }')
    for stages, code in (("b,c", 0), ("b", 2)):
        assert main(["caffe", "train", "--solver=solver.prototxt", f"--stage={stages}"]) == code
    assert "the net has no loss" in capsys.readouterr().err
    for level, code in (("2", 0), ("1", 2)):
        words = ["--solver=solver.prototxt", "--stage=b,c", f"--level={level}"]
        assert main(["caffe", "train", *words]) == code


@pytest.mark.parametrize(("prefix", "stem"), [("", "solver"), ("saved", "saved/solver")])
@pytest.mark.usefixtures("folder")
def test_what_is_saved_is_named_like_the_solver_if_nothing_else_is_said(prefix: str, stem: str):
    Path("saved").mkdir()
    text = Path("solver.prototxt").read_text()
    said_so = f'snapshot_prefix: "{prefix}"' if prefix else ""
    Path("solver.prototxt").write_text(text.replace('snapshot_prefix: "run"', said_so))
    assert main(["caffe", "train", "--solver=solver.prototxt"]) == 0
    saved = f"{stem}_iter_4.caffemodel"
    again = ["--solver=solver.prototxt", f"--weights={saved}, {saved}"]
    assert main(["caffe", "train", *again]) == 0


@pytest.mark.parametrize(("number", "stops"), [(signal.SIGHUP, False), (signal.SIGINT, True)])
@pytest.mark.usefixtures("folder")
def test_signals_save_and_stop(
    number: signal.Signals, stops: bool, capsys: pytest.CaptureFixture[str]
):
    def send() -> None:
        for _ in range(600):
            if signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, signal.SIG_IGN):
                break
            time.sleep(0.1)
        os.kill(os.getpid(), number)
        if not stops:
            for _ in range(600):
                if list(Path().glob("run_iter_*.solverstate")):
                    break
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    assert main(["caffe", "train", "--solver=long.prototxt"]) == 0
    sender.join()
    lines = said(capsys)
    assert lines[-2:] == ["Optimization stopped early.", "Optimization Done."]
    saved = sum(line.startswith("Snapshotting solver state") for line in lines)
    assert saved == (1 if stops else 2)


SPELLED = [
    "train --solver=solver.prototxt --log_dir=logs -alsologtostderr --logtostderr=0 -v 1",
    "-minloglevel 0 --solver solver.prototxt train",
    "--nologtostderr train -iterations=7 -model=unused --phase TEST -solver=solver.prototxt",
    "train -solver solver.prototxt -level -1 -colorlogtostderr=false --max_log_size=3",
]
"""As Caffe takes it: one dash or two, before the command or behind it, flags of others, too."""


@pytest.mark.parametrize("words", SPELLED)
@pytest.mark.usefixtures("folder")
def test_flags_are_spelled_as_for_caffe(words: str, capsys: pytest.CaptureFixture[str]):
    Path("logs").mkdir()
    assert main(["caffe", *words.split()]) == 0
    lines = said(capsys)
    assert lines[-1] == "Optimization Done."
    if "log_dir" in words:
        (file,) = Path("logs").glob("caffe.*.log.INFO.*")
        assert Path("logs/caffe.INFO").resolve() == file.resolve()
        head, *rest = file.read_text().splitlines()
        assert head.startswith("Log file created at: ")
        assert [match[1] for match in map(GLOG.fullmatch, rest) if match] == lines


@pytest.mark.usefixtures("folder")
def test_what_is_said_follows_the_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    train = ["caffe", "train", "--solver=solver.prototxt"]
    for flags in (["--minloglevel=1"], ["--noalsologtostderr"], ["-alsologtostderr=false"]):
        assert main([*train, *flags]) == 0
        assert capsys.readouterr() == ("", "")
    assert main([*train, "--log_dir=none"]) == 2
    assert "make it first" in capsys.readouterr().err
    monkeypatch.setenv("GLOG_minloglevel", "2")
    assert main(train) == 0
    assert capsys.readouterr() == ("", "")


def test_version_help_and_devices(capsys: pytest.CaptureFixture[str]):
    for word in ("-version", "--version"):
        assert main(["caffe", word]) == 0
        assert capsys.readouterr().out == "caffe version 1.0.0\n"
    for words in (["-help"], ["--help"], ["train", "-help"], ["-help", "train"]):
        assert main(["caffe", *words]) == 0
        assert capsys.readouterr().out.startswith("usage: soonest caffe")
    assert main(["caffe", "device_query"]) == 0
    assert said(capsys) == ["Querying GPUs "]


HINTS = {
    b'\xef\xbb\xbfname: "x"': "save it as UTF-8 without one",
    b'layer { name: "C:\\Users\\me" }': "write / or",
    b"layer { pooling_param { ceil_mode: false } }": "BVLC's word is round_mode, FLOOR for false",
}


@pytest.mark.parametrize("text", HINTS)
def test_what_often_stands_in_files_has_a_hint(
    text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "net.prototxt"
    path.write_bytes(text)
    assert main(["caffe", "time", f"--model={path}"]) == 2
    assert HINTS[text] in capsys.readouterr().err


WRONG = {
    (): "give a command: train, test",
    ("trian",): "invalid choice: 'trian'",
    ("train", "--solvr=x"): "unrecognized arguments: --solvr=x",
    ("train", "--logtostderr=maybe"): "neither true nor false",
    ("train", "--solver=solver.prototxt", "--snapshot=x.caffemodel"): "cannot read x.caffemodel",
    ("train",): "--solver=solver.prototxt",
    ("train", "--solver=x", "--weights=a", "--snapshot=b"): "but not both",
    ("train", "--solver=none.prototxt"): "cannot read none.prototxt",
    ("train", "--solver=solver.prototxt", "--weights=none"): "cannot read none",
    ("train", "--solver=net.prototxt"): "SolverParameter",
    ("train", "--solver=solver.prototxt", "--sigint_effect=sing"): "invalid choice",
    ("test", "--model=net.prototxt"): "--weights=net.caffemodel",
    ("time",): "--model=net.prototxt",
    ("time", "--model=net.prototxt", "--iterations=0"): "0 is too few",
}


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.usefixtures("folder")
def test_a_wrong_request_is_one_line_and_code_2(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    assert main(["caffe", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("soonest: ")
    assert WRONG[words] in line


ERRORS = {
    (folder, name): case
    for folder in (golden.FOLDER, golden.SECOND)
    for name, case in golden.index("snapshots/errors.json", folder).items()
}
REFUSED = [key for key, case in ERRORS.items() if not case["accepted"]]
DONE_ALL_THE_SAME = {"stochastic_on_cpu", "hdf5_output_two_passes"}
"""What Caffe's README says that a new program may have."""
IN_NETS = {
    "unknown_layer_type", "unknown_bottom", "duplicate_top", "unclosed_brace", "unknown_field",
    "bad_enum", "string_for_number", "missing_kernel", "missing_num_output",
    "group_does_not_divide", "kernel_larger_than_input", "label_count", "concat_mismatch",
    "shared_param_shape", "loss_weight_count", "missing_lmdb", "crop_too_large",
}  # fmt: skip
"""Of the first set; all of the second are in nets."""


@pytest.mark.parametrize(("folder", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_what_caffe_refuses_is_refused(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    shutil.copytree(folder / "snapshots", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    done = name in DONE_ALL_THE_SAME
    assert main(ERRORS[folder, name]["command"]) == (0 if done else 2)
    *_, line = capsys.readouterr().err.splitlines()
    if not done:
        assert line.startswith("soonest: ")
        in_net = name in IN_NETS or folder == golden.SECOND
        assert bool(re.search(r"[\w.]+\.net\.prototxt:\d+:", line)) == in_net


def test_what_caffe_takes_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(golden.SECOND / "snapshots")
    assert main(ERRORS[golden.SECOND, "input_beside_layer"]["command"]) == 0
