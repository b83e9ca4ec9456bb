"""pycaffe's solvers: step by step they come to what real Caffe came to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import golden_caffe as golden
from soonest import pycaffe as caffe

CASES = [
    golden.FOLDER / "solvers" / "adam_step_clip",
    golden.FOLDER / "solvers" / "nesterov_step_clip_iter2",
    golden.SECOND / "solvers" / "fcn_sizes",
]


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_steps_come_to_what_caffes_came_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    prefix = str(tmp_path / "run")
    own = caffe.get_solver("solver.prototxt")
    own.param.snapshot_prefix = prefix
    own.net.copy_from("init.caffemodel")
    for net in own.test_nets:
        net.share_with(own.net)
    for _ in range(10):
        own.step(1)
    own.snapshot()
    golden.compare(folder, "snap_iter_10", Path(prefix), 10, "")
    own.step(10)
    own.snapshot()
    golden.compare(folder, "snap_iter_20", Path(prefix), 20, "")


NET = """
layer { name: "x" type: "DummyData" top: "x" top: "y" dummy_data_param { shape { dim: 4 dim: 3 }
  shape { dim: 4 dim: 2 } data_filler { type: "constant" value: 1 } } }
layer { name: "ip" type: "InnerProduct" bottom: "x" top: "ip"
  inner_product_param { num_output: 2 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "ip" bottom: "y" top: "loss" }
"""
SOLVER = (
    'net: "net.prototxt" base_lr: 0.1 lr_policy: "step" gamma: 0.1 stepsize: 5 max_iter: 20 '
    'test_iter: 1 test_interval: 100 snapshot_prefix: "s" {}'
)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(NET)
    Path("solver.prototxt").write_text(SOLVER.format(""))
    return tmp_path


def test_each_type_has_its_class(files: Path):
    for name in ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"):
        more = "momentum: 0.9" if name in ("Nesterov", "AdaDelta", "Adam") else ""
        Path("solver.prototxt").write_text(SOLVER.format(f'type: "{name}" {more}'))
        class_ = getattr(caffe, f"{name}Solver")
        own = caffe.get_solver("solver.prototxt")
        assert type(own) is class_
        assert isinstance(own, caffe.Solver)
        own.step(2)
        assert (own.iter, own.param.type) == (2, name)
        assert type(own._trainer.optimizer).__name__ == name
    Path("solver.prototxt").write_text(SOLVER.format('type: "Lion"'))
    with pytest.raises(ValueError, match="Lion"):
        caffe.get_solver("solver.prototxt")


def test_a_solver_can_be_driven_by_hand(files: Path):
    own = caffe.SGDSolver("solver.prototxt")
    own.net.forward()
    own.net.backward()
    before = own.net.params["ip"][0].data.copy()
    diff = own.net.params["ip"][0].diff.copy()
    assert np.abs(diff).max() > 0
    assert own.lr == pytest.approx(0.1)
    own.apply_update()
    assert own.net.params["ip"][0].data == pytest.approx(before - 0.1 * diff, abs=1e-6)


def test_what_is_set_between_steps_counts(files: Path):
    own = caffe.SGDSolver("solver.prototxt")
    own.net.params["ip"][0].data[...] = 0
    own.net.params["ip"][1].data[...] = 1
    own.step(1)
    assert float(own.net.blobs["loss"].data) == 0
    assert not own.net.params["ip"][0].data.any()
    assert float(own.test_nets[0].forward()["loss"]) == 0


def test_callbacks_are_called_around_each_pass(files: Path):
    own = caffe.SGDSolver("solver.prototxt")
    calls: list[str] = []

    def ready() -> None:
        calls.append("ready" if np.abs(own.net.params["ip"][0].diff).max() > 0 else "nothing")

    own.add_callback(lambda: calls.append("start"), ready)
    own.step(2)
    assert calls == ["start", "ready"] * 2


def test_solving_saves_and_goes_on_from_there(files: Path, capsys: pytest.CaptureFixture[str]):
    own = caffe.SGDSolver("solver.prototxt")
    own.solve()
    assert own.iter == 20
    assert Path("s_iter_20.caffemodel").exists()
    again = caffe.SGDSolver("solver.prototxt")
    again.restore("s_iter_20.solverstate")
    assert np.array_equal(again.net.params["ip"][0].data, own.net.params["ip"][0].data)
    assert "Optimization Done." in capsys.readouterr().err
