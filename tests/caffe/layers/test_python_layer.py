"""Layers that a module defines in Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from soonest.caffe.net.net import Net
from soonest.caffe.proto.text import parse
from soonest.caffe.solver.training import Trainer

MODULE = """
import numpy as np
from soonest.caffe.layers.python import PythonLayer

class Euclidean(PythonLayer):
    def setup(self, bottom, top):
        if len(bottom) != 2:
            raise ValueError("it needs two bottoms")

    def reshape(self, bottom, top):
        self.difference = np.zeros_like(bottom[0].data)
        top[0].reshape(1)

    def forward(self, bottom, top):
        self.difference[...] = bottom[0].data - bottom[1].data
        top[0].data[...] = np.sum(self.difference ** 2) / bottom[0].num / 2.0

    def backward(self, top, propagate_down, bottom):
        for place, sign in ((0, 1), (1, -1)):
            if propagate_down[place]:
                scale = sign * top[0].diff[0] / bottom[place].num
                bottom[place].diff[...] = scale * self.difference

class Gain(PythonLayer):
    def setup(self, bottom, top):
        self.blobs.add_blob(bottom[0].channels)
        self.blobs[0].data[...] = float(self.param_str)

    def reshape(self, bottom, top):
        top[0].reshape(*bottom[0].data.shape)

    def forward(self, bottom, top):
        top[0].data[...] = bottom[0].data * self.blobs[0].data[:, None]

    def backward(self, top, propagate_down, bottom):
        self.blobs[0].diff[...] = (top[0].diff * bottom[0].data).sum((0, 2))
        bottom[0].diff[...] = top[0].diff * self.blobs[0].data[:, None]

class Sizes(PythonLayer):
    def setup(self, bottom, top):
        self.passes = 0

    def reshape(self, bottom, top):
        top[0].reshape(1, 2, 3 + self.passes)

    def forward(self, bottom, top):
        top[0].data[...] = self.phase
        self.passes += 1
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "layers_of_a_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def python(name: str, bottoms: str, top: str, more: str = "") -> str:
    return (
        f'layer {{ name: "{name}" type: "Python" {bottoms} top: "{top}" python_param {{ '
        f'module: "layers_of_a_test" layer: "{name}" param_str: "3" }} {more} }}\n'
    )


DATA = """
layer { name: "x" type: "Input" top: "x" top: "y"
  input_param { shape { dim: 4 dim: 2 dim: 3 } } }
"""


def net(source: str, phase: str = "TRAIN") -> Net:
    return Net(parse(source, "NetParameter"), phase, file="net.prototxt")


def test_a_loss_of_ones_own_is_the_built_in_one():
    own = net(DATA + python("Euclidean", 'bottom: "x" bottom: "y"', "l", "loss_weight: 2"))
    built_in = net(
        DATA + 'layer { type: "EuclideanLoss" bottom: "x" bottom: "y" top: "l" loss_weight: 2 }'
    )
    grads = []
    for made in (own, built_in):
        torch.manual_seed(1)
        for size in (3, 5):  # Every pass has its own shapes.
            x, y = (torch.randn(4, 2, size, requires_grad=True) for _ in range(2))
            loss = made({"x": x, "y": y}).loss
            loss.backward()
            grads += [loss.detach(), x.grad, y.grad]
    for mine, theirs in zip(grads[:6], grads[6:], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_blobs_of_ones_own_are_learned_and_kept():
    source = DATA + python("Gain", 'bottom: "x"', "g")
    made = net(source)
    x = torch.randn(4, 2, 3, requires_grad=True)
    top = made({"x": x}).outputs["g"]
    assert torch.equal(top, 3 * x)
    top.sum().backward()
    (blob,) = made.layers["Gain"].blobs()
    torch.testing.assert_close(blob.grad, x.detach().sum((0, 2)))
    assert x.grad is not None
    assert (x.grad == 3).all()
    assert made.to_message().layer[-1].blobs[0].data.tolist() == [3, 3]


def test_it_may_write_in_place():
    made = net(DATA + python("Gain", 'bottom: "x"', "x"))
    x = torch.randn(4, 2, 3, requires_grad=True)
    before = x.detach().clone()
    top = made({"x": x}).outputs["x"]
    assert torch.equal(x, before)
    assert torch.equal(top, 3 * before)


def test_it_may_make_data_of_several_sizes():
    made = net(python("Sizes", "", "d"), "TEST")
    assert made.shapes["d"] == (1, 2, 3)
    tops = [made().outputs["d"] for _ in range(3)]
    assert [tuple(top.shape) for top in tops] == [(1, 2, 3), (1, 2, 4), (1, 2, 5)]
    assert (tops[0] == 1).all()


def test_a_solver_trains_through_it():
    source = (
        'base_lr: 0.1 lr_policy: "fixed" max_iter: 50 random_seed: 2 snapshot_after_train: false '
        'net_param { layer { type: "DummyData" top: "x" top: "y" dummy_data_param { '
        "shape { dim: 4 dim: 2 dim: 3 } data_filler { value: 1 } data_filler { value: 2 } } }"
        + python("Gain", 'bottom: "x"', "g")
        + python("Euclidean", 'bottom: "g" bottom: "y"', "l", "loss_weight: 1")
        + "}"
    )
    trainer = Trainer(parse(source, "SolverParameter"), say=lambda line: None)
    trainer.solve()
    (blob,) = trainer.net.layers["Gain"].blobs()
    np.testing.assert_allclose(blob.detach(), [2, 2], atol=1e-2)


WRONG = {
    'module: "no_such_module" layer: "X"': "no module 'no_such_module': put its folder",
    'module: "layers_of_a_test" layer: "X"': "has no class 'X' derived from caffe.Layer",
    'module: "layers_of_a_test"': "give the module and the layer",
    'module: "layers_of_a_test" layer: "Euclidean"': "it needs two bottoms",
}


@pytest.mark.parametrize("spec", WRONG)
def test_what_cannot_be_made_is_refused_with_its_line(spec: str):
    source = f'{DATA}layer {{ name: "it" type: "Python" bottom: "x" python_param {{ {spec} }} }}'
    with pytest.raises(ValueError, match=f"net.prototxt:4: layer 'it' .*{WRONG[spec]}"):
        net(source)
