"""Training beside real Caffe: weights, histories, losses and log lines, iteration by iteration."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import golden_caffe as golden
from soonest.caffe.io import prototxt, weights
from soonest.caffe.proto.text import parse
from soonest.caffe.solver.rates import Rate
from soonest.caffe.solver.solvers import AdaGrad, make
from soonest.caffe.solver.training import Trainer

FOLDERS = [
    *(
        folder / "solvers" / name
        for folder in (golden.FOLDER, golden.SECOND)
        for name in golden.index("solvers/index.json", folder)["cases"]
    ),
    golden.FOLDER / "legacy" / "hdf5",
    golden.FOLDER / "legacy" / "v1_train",
]
LOSS = 1e-5


def without_times(lines: list[str], prefix: str) -> list[str]:
    lines = [re.sub(r"\(\S+ iter/s, \S+s/", "(# iter/s, #s/", line) for line in lines]
    return [line.replace(prefix, "snap") for line in lines]


def words(line: str) -> str:
    return re.sub(r"-?\d+\.?\d*(e-?\d+)?", "N", line)


def numbers(line: str) -> list[float]:
    return [float(one) for one in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", line)]


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_training_goes_as_in_caffe(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    ending = ".h5" if folder.name == "hdf5" else ""
    large_batch = Path("reference/solver.prototxt")
    path = large_batch if large_batch.exists() else Path("solver.prototxt")
    expected = json.loads(Path("expected/losses.json").read_text(encoding="utf-8"))
    prefix = tmp_path / "run"
    run = golden.Run(prototxt.read_solver(path), prefix, "init.caffemodel", resume=False)
    for iteration in (10, 20):
        golden.compare(folder, f"snap_iter_{iteration}", prefix, iteration, ending)
    wanted = [one["loss"] for one in expected["iterations"]]
    np.testing.assert_allclose(run.losses, wanted, rtol=LOSS)
    logs = [(run, expected.get("log"), expected["iterations"])]
    if expected.get("resumed_from_10"):
        prefix = tmp_path / "resumed"
        start = f"expected/snap_iter_10.solverstate{ending}"
        again = golden.Run(prototxt.read_solver(path), prefix, start, resume=True)
        golden.compare(folder, "resumed_iter_20", prefix, 20, ending)
        losses = expected["resumed_from_10"]["iterations"]
        logs.append((again, expected.get("log_resumed"), losses))
    for one, lines, losses in logs:
        np.testing.assert_allclose(one.losses, [loss["loss"] for loss in losses], rtol=LOSS)
        if lines is None:  # Of HDF5 there are only the files.
            continue
        found = without_times(one.lines, str(tmp_path / ("run" if one is run else "resumed")))
        # The program that was around Caffe's solver says that it is done once more.
        wanted_lines = without_times(lines[:-1], "snap")
        assert [words(line) for line in found] == [words(line) for line in wanted_lines]
        for mine, theirs in zip(found, wanted_lines, strict=True):
            assert numbers(mine) == pytest.approx(numbers(theirs), rel=2e-5, abs=1e-5), theirs


REFUSED = {
    "unknown_lr_policy": "no lr_policy 'cosine'",
    "unknown_solver_type": "no solver 'Lion'",
    "missing_net_file": "cannot read no_such_net.prototxt",
    "no_net": "no net to train",
    "net_and_train_net": "give one of net",
    "sigmoid_negative_gamma": "gamma is -0.5",
    "type_and_solver_type": "both 'type' and 'solver_type'",
    "solver_unknown_field": r":2:1: .*'base_learning_rate'",
    "snapshot_prefix_no_folder": "make sure that the folder",
    "snapshot_prefix_no_folder_interval": "make sure that the folder",
    "missing_lmdb": "there is no data base",
    "crop_too_large": "crop_size 12 is larger",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_caffe_refuses_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(golden.FOLDER / "snapshots")
    with pytest.raises(ValueError, match=REFUSED[name]):
        Trainer(prototxt.read_solver(f"{name}.solver.prototxt"), say=lambda line: None)


STARTS = {
    "no_such.caffemodel": "cannot read no_such.caffemodel",
    "truncated.caffemodel": "truncated.caffemodel, byte 392",
    "wrong_shape.caffemodel": r"layer 'score'.*\[10, 36\].*\[10, 30\]",
    "wrong_blob_count.caffemodel": r"layer 'conv'.*it has 2 blobs, but 1",
    "truncated.solverstate": "truncated.solverstate, byte",
    "wrong_history.solverstate": "has 8 histories",
}


def test_starts_that_caffe_refuses_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(golden.FOLDER / "snapshots")
    lines: list[str] = []
    solver = prototxt.read_solver("solver.prototxt")
    solver.snapshot_prefix = str(tmp_path / "snap")
    trainer = Trainer(solver, say=lines.append)
    for name, why in STARTS.items():
        with pytest.raises(ValueError, match=why):
            (trainer.resume if name.endswith("state") else lambda x: trainer.finetune([x]))(name)
    lines.clear()
    trainer.finetune(["extra_layer.caffemodel"])
    assert lines == ["Finetuning from extra_layer.caffemodel", "Ignoring source layer stranger"]
    trainer.solve()
    assert lines[-1] == "Optimization Done."
    assert (tmp_path / "snap_iter_2.caffemodel").exists()


def test_a_net_without_a_loss_is_refused():
    source = (
        'base_lr: 1 lr_policy: "fixed" snapshot_after_train: false net_param { '
        'layer { type: "DummyData" top: "x" dummy_data_param { shape { dim: 1 } } } }'
    )
    with pytest.raises(ValueError, match="no loss"):
        Trainer(parse(source, "SolverParameter"), say=lambda line: None)


FROZEN = """
base_lr: 0.1 lr_policy: "fixed" max_iter: 3 momentum: 0.9 snapshot_after_train: false
type: "{type}" net_param {{
  layer {{ name: "d" type: "DummyData" top: "x" top: "l" dummy_data_param {{
    shape {{ dim: 8 dim: 3 }} shape {{ dim: 8 }}
    data_filler {{ type: "gaussian" mean: 5 }} data_filler {{ }} }} }}
  layer {{ name: "b" type: "BatchNorm" bottom: "x" top: "b" }}
  layer {{ name: "f" type: "InnerProduct" bottom: "b" top: "f" param {{ lr_mult: 0 }}
    param {{ lr_mult: 0 }} inner_product_param {{ num_output: 2
      weight_filler {{ type: "xavier" }} }} }}
  layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "f" bottom: "l" top: "loss" }} }}
"""


@pytest.mark.parametrize("type_", ["SGD", "Adam"])
def test_where_nothing_learns_statistics_move_all_the_same(type_: str):
    trainer = Trainer(parse(FROZEN.format(type=type_), "SolverParameter"), say=lambda line: None)
    before = trainer.net.layers["f"].weight.detach().clone()
    trainer.solve()
    assert torch.equal(trainer.net.layers["f"].weight, before)
    norm = trainer.net.layers["b"]
    assert norm.scale.item() == pytest.approx(1 + 0.999 + 0.999**2)
    assert (norm.mean / norm.scale).tolist() == pytest.approx([5, 5, 5], abs=1)


def test_with_force_backward_frozen_blobs_have_gradients_but_do_not_move():
    source = FROZEN.format(type="SGD").replace("net_param {", "net_param { force_backward: true")
    trainer = Trainer(parse(source, "SolverParameter"), say=lambda line: None)
    weight = trainer.net.layers["f"].weight
    before = weight.detach().clone()
    trainer.solve()
    assert torch.equal(weight, before)
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


PERMISSIVE = """
base_lr: 0.1 lr_policy: "fixed" momentum: 0.9 max_iter: 3 random_seed: 4 snapshot_prefix: "{prefix}"
test_iter: 1 test_interval: 2 net_param {{
  layer {{ name: "d" type: "DummyData" top: "x" top: "y" dummy_data_param {{
    shape {{ dim: 4 dim: 6 }} shape {{ dim: 4 dim: 6 }} data_filler {{ value: 1 }}
    data_filler {{ value: 2 }} }} }}
  layer {{ name: "a" type: "InnerProduct" bottom: "x" top: "a" param {{ name: "w" }}
    inner_product_param {{ num_output: 3 bias_term: false weight_filler {{ type: "xavier" }} }} }}
  layer {{ name: "b" type: "InnerProduct" bottom: "a" top: "b"
    param {{ name: "w" share_mode: PERMISSIVE }}
    inner_product_param {{ num_output: 6 bias_term: false }} }}
  layer {{ name: "l" type: "EuclideanLoss" bottom: "b" bottom: "y" top: "l" }} }}
"""


def test_one_memory_in_two_shapes_is_trained_tested_and_saved(tmp_path: Path):
    prefix = str(tmp_path / "run")
    solver = parse(PERMISSIVE.format(prefix=prefix), "SolverParameter")
    trainer = Trainer(solver, say=lambda line: None)
    trainer.solve()
    for net in (trainer.net, *trainer.tests):
        a, b = net.layers["a"].weight, net.layers["b"].weight
        assert a.shape == (3, 6)
        assert torch.equal(a.flatten(), b.flatten())
        assert a.data_ptr() == b.data_ptr() == trainer.net.layers["a"].weight.data_ptr()
    saved = weights.read(f"{prefix}_iter_3.caffemodel")
    assert saved["b"][0].shape == (6, 3)
    assert np.array_equal(saved["a"][0].ravel(), saved["b"][0].ravel())
    again = Trainer(solver, say=lambda line: None)
    again.resume(f"{prefix}_iter_3.solverstate")
    assert torch.equal(again.net.layers["b"].weight, trainer.net.layers["b"].weight)


def test_layers_of_one_name_are_warned_of(capsys: pytest.CaptureFixture[str]):
    Trainer(parse(TINY.replace("MORE", "").replace('name: "b"', 'name: "a"'), "SolverParameter"))
    assert "several layers are named 'a'" in capsys.readouterr().err


TINY = """
base_lr: 0.1 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.5 max_iter: 3
snapshot_after_train: false MORE net_param {
  layer { name: "d" type: "DummyData" top: "x" top: "y"
    dummy_data_param { shape { dim: 4 dim: 6 } shape { dim: 4 dim: 2 } } }
  layer { name: "a" type: "InnerProduct" bottom: "x" top: "a"
    inner_product_param { num_output: 2 weight_filler { type: "xavier" } } }
  layer { name: "b" type: "InnerProduct" bottom: "a" top: "b"
    inner_product_param { num_output: 2 weight_filler { type: "xavier" } } }
  layer { name: "s" type: "Silence" bottom: "b" }
  layer { name: "l" type: "EuclideanLoss" bottom: "a" bottom: "y" top: "l" } }
"""


def tiny(more: str = "") -> Trainer:
    return Trainer(parse(TINY.replace("MORE", more), "SolverParameter"), say=lambda line: None)


def test_blobs_that_the_loss_does_not_reach_decay():
    trainer = tiny("random_seed: 1")
    weight = trainer.net.layers["b"].weight
    expected, history = weight.detach().clone(), torch.zeros_like(weight)
    trainer.solve()
    for _ in range(3):
        history = 0.9 * history + 0.1 * 0.5 * expected
        expected = expected - history
    torch.testing.assert_close(weight.detach(), expected)


def test_without_a_seed_every_run_starts_elsewhere():
    def started(more: str) -> torch.Tensor:
        return tiny(more).net.layers["a"].weight.detach()

    assert torch.equal(started("random_seed: 1"), started("random_seed: 1"))
    assert not torch.equal(started(""), started(""))


def test_momentum_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="AdaGrad has no momentum"):
        AdaGrad([torch.nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ('type: "Adam" momentum2: 1', "momentum2 is 1: Adam needs 0 or more"),
        ('type: "RMSProp" rms_decay: -0.5', "rms_decay is -0.5: RMSProp needs"),
    ],
)
def test_settings_out_of_range_are_refused(more: str, why: str):
    with pytest.raises(ValueError, match=why):
        make(parse(more, "SolverParameter"), [(torch.zeros(1), 1.0)])


def test_a_rate_beyond_float32_is_infinite():
    solver = parse('base_lr: 1 lr_policy: "exp" gamma: 2', "SolverParameter")
    assert [Rate(solver).at(iteration) for iteration in (3, 200, 9999)] == [8, math.inf, math.inf]
