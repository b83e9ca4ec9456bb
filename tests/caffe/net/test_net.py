"""Nets as a whole: which layers, how they are joined, and whose weights they take."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from helpers import golden_caffe as golden
from soonest.caffe.io import prototxt, weights
from soonest.caffe.net.net import Net
from soonest.caffe.net.trained import copy_weights
from soonest.caffe.proto import text, wire
from soonest.caffe.proto.message import Message
from soonest.caffe.proto.text import parse

X = 'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 2 dim: 6 } } }\n'


def net(source: str, phase: str = "TRAIN", state: str = "") -> Net:
    given = parse(state, "NetState") if state else None
    return Net(parse(source, "NetParameter"), phase, state=given, file="net.prototxt")


def ip(name: str, bottom: str = "x", more: str = "") -> str:
    return (
        f'layer {{ name: "{name}" type: "InnerProduct" bottom: "{bottom}" top: "{name}" {more} '
        'inner_product_param { num_output: 6 weight_filler { type: "xavier" } } }\n'
    )


@pytest.mark.parametrize(
    ("rule", "phase", "state", "there"),
    [
        ("include { phase: TEST }", "TRAIN", "", False),
        ("include { phase: TEST }", "TEST", "", True),
        ("exclude { phase: TEST }", "TEST", "", False),
        ("include { phase: TEST } include { phase: TRAIN }", "TRAIN", "", True),
        ("include { min_level: 2 max_level: 3 }", "TEST", "level: 2", True),
        ("include { min_level: 2 }", "TEST", "", False),
        ("include { max_level: 1 }", "TEST", "level: 2", False),
        ('include { stage: "a" stage: "b" }', "TEST", 'stage: "a"', False),
        ('include { stage: "a" stage: "b" }', "TEST", 'stage: "b" stage: "a"', True),
        ('include { not_stage: "a" }', "TEST", 'stage: "a"', False),
        ('exclude { stage: "a" }', "TEST", 'stage: "b"', True),
        ("include { phase: TRAIN }", "TEST", "phase: TRAIN", True),
    ],
)
def test_rules_choose_layers(rule: str, phase: str, state: str, there: bool):
    made = net(X + ip("it", more=rule), phase, state)
    assert ("it" in made.layers) == there


WRONG = {
    ip("a", "y"): "its bottom 0 is 'y', which no layer before it makes",
    ip("a") + ip("a"): "its top 'a' is made by another layer",
    'layer { name: "a" type: "Rectify" bottom: "x" }': "no such type: it has AbsVal",
    'layer { name: "a" type: "Python" top: "m" }': "give the module and the layer",
    ip("a", more="loss_weight: [1, 2]"): "give one for each top, or none",
    ip("a", more="propagate_down: [true, true]"): "propagate_down must be given once",
    ip("a", more="param { } param { } param { }"): "only 2 blobs",
    ip("a", more="include { } exclude { }"): "both include and exclude",
    ip("a", more='param { name: "w" }')
    + 'layer { name: "b" type: "InnerProduct" bottom: "x" top: "b" param { name: "w" } '
    "inner_product_param { num_output: 1 } }": r"\[1, 6\] here and \[6, 6\] there; .* PERMISSIVE",
    ip("a", more='param { name: "w" lr_mult: 1 }')
    + ip("b", more='param { name: "w" lr_mult: 2 }'): "lr_mult is 2 here and 1 there",
}


@pytest.mark.parametrize("source", WRONG)
def test_what_cannot_be_joined_is_refused_with_its_line(source: str):
    with pytest.raises(ValueError, match=WRONG[source]) as caught:
        net(X + source)
    assert re.match(r"net\.prototxt:[23]: layer '[ab]'", str(caught.value)) or "line 2" in str(
        caught.value
    )


def test_a_layer_in_place_takes_the_place_of_its_bottom():
    made = net(
        X + 'layer { name: "p" type: "Power" bottom: "x" top: "x" power_param { shift: 1 } }'
    )
    assert made().outputs["x"].unique().tolist() == [1]


def test_shared_blobs_are_one_parameter_with_the_rates_of_whoever_gives_them():
    made = net(
        X
        + ip("a", more='param { name: "w" decay_mult: 3 }')
        + ip("b", "a", 'param { name: "w" lr_mult: 2 } param { lr_mult: 0 }')
    )
    a, b = (step.layer for step in made.steps[1:])
    assert a.weight is b.weight
    assert [(one.lr_mult, one.decay_mult) for one in made.stored] == [(2, 3), (1, 1), (0, 1)]
    assert len(list(made.parameters())) == 3
    assert not b.bias.requires_grad
    made().outputs["b"].sum().backward()
    assert isinstance(a.weight, nn.Parameter)
    assert a.weight.grad is not None


def test_losses_are_weighted_and_outputs_in_alphabetical_order():
    made = net(
        X
        + ip("z", more="loss_weight: 0.5")
        + 'layer { name: "e" type: "EuclideanLoss" bottom: "x" bottom: "x" }'
    )
    result = made({"x": torch.ones(2, 6)})
    assert list(result.outputs) == ["(automatic) e", "z"]
    assert result.loss.item() == pytest.approx(0.5 * result.outputs["z"].sum().item())
    assert made.loss_weight("z") == 0.5
    assert made.loss_weight("(automatic) e") == 1


def test_propagate_down_stops_gradients():
    made = net(X + ip("a") + ip("b", "a", "propagate_down: false"))
    made().outputs["b"].sum().backward()
    a, b = (step.layer for step in made.steps[1:])
    assert a.weight.grad is None
    assert b.bias.grad is not None


def test_an_unknown_input_is_refused():
    with pytest.raises(ValueError, match="no input 'y'"):
        net(X)({"y": torch.ones(1)})


def test_names_that_torch_does_not_allow():
    made = net(X + ip("conv1/3x3.reduce") + ip("keys") + ip("conv1/3x3_reduce"))
    assert len(made.layers) == 4
    assert len(made.state_dict()) == 6


def test_weights_go_by_the_name_of_the_layer(tmp_path: Path):
    source = net(
        X + ip("a", more='param { name: "w" }') + ip("b", more='param { name: "w" }') + ip("c")
    )
    target = net(X + ip("a") + ip("c") + ip("d"))
    kept = target.layers["d"].weight.clone()
    weights.write_message(tmp_path / "s.caffemodel", source.to_message())
    found = weights.read(tmp_path / "s.caffemodel")
    assert copy_weights(target, found) == ["b"]
    assert torch.equal(target.layers["a"].weight, source.layers["a"].weight)
    assert torch.equal(target.layers["c"].bias, source.layers["c"].bias)
    assert torch.equal(target.layers["d"].weight, kept)


def test_weights_of_another_shape_or_number_are_refused():
    target = net(X + ip("a"))
    with pytest.raises(ValueError, match=r"layer 'a'.*\[6, 6\].*\[2, 3\].*rename the layer"):
        copy_weights(target, {"a": {0: np.zeros((2, 3), np.float32), 1: np.zeros(6, np.float32)}})
    with pytest.raises(ValueError, match="it has 2 blobs, but 1 are stored"):
        copy_weights(target, {"a": {0: np.zeros((6, 6), np.float32)}})


@pytest.mark.parametrize("name", ["v0_net", "v1_inputs"])
def test_old_nets_with_old_weights_give_what_caffe_gives(name: str):
    folder = golden.FOLDER / "legacy"
    case = golden.index("legacy/index.json")[name]
    made = Net(prototxt.read_net(folder / case["prototxt"]), case["phase"])
    copy_weights(made, weights.read(folder / case["caffemodel"]))
    stored = np.load(folder / case["npz"])
    fed = {key[3:]: torch.from_numpy(stored[key]) for key in stored.files if key[:3] == "in/"}
    for blob in fed:
        fed[blob].requires_grad_(f"indiff/{blob}" in stored.files)
    result = made(fed, keep=True)
    layers = {step.layer.spec.name: step.layer for step in made.steps}
    if any(key.startswith("paramdiff") for key in stored.files):
        result.loss.backward()
    for key in stored.files:
        kind, blob, *number = key.split("/")
        if kind == "top":
            found = result.blobs[blob]
        elif kind == "indiff":
            found = fed[blob].grad
        elif kind in ("param", "paramdiff"):
            found = layers[blob].blobs()[int(number[0])]
            found = found.grad if kind == "paramdiff" else found
        else:
            continue
        assert found is not None
        np.testing.assert_allclose(
            found.detach().numpy().reshape(stored[key].shape), stored[key], rtol=1e-5, atol=1e-5
        )


def test_an_old_batch_norm_gives_what_caffe_gives():
    folder = golden.FOLDER / "legacy"
    made = Net(prototxt.read_net(folder / "old_batchnorm.prototxt"), "TEST")
    stored = np.load(folder / "old_batchnorm.npz")
    copy_weights(
        made,
        {layer: {n: stored[f"param/{layer}/{n}"] for n in range(count)}
         for layer, count in (("bn", 3), ("sc", 2))},
    )  # fmt: skip
    found = made({"x": torch.from_numpy(stored["in/x"])}).outputs["bn"]
    np.testing.assert_allclose(found.detach().numpy(), stored["top/bn"], rtol=1e-5, atol=1e-5)
    assert [one.lr_mult for one in made.stored] == [0, 0, 0, 1, 1]


SIZES = """
layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 1 dim: 2 dim: 4 dim: 4 } } }
layer { name: "max" type: "Pooling" bottom: "x" top: "max"
  pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "ave" type: "Pooling" bottom: "x" top: "ave"
  pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 } }
layer { name: "cut" type: "Slice" bottom: "x" top: "up" top: "down" slice_param { axis: 2 } }
layer { name: "cat" type: "Concat" bottom: "down" bottom: "up" top: "cat" concat_param { axis: 3 } }
layer { name: "conv" type: "Convolution" bottom: "x" top: "conv" convolution_param {
  num_output: 3 kernel_size: 3 pad: 1 weight_filler { type: "xavier" } } }
layer { name: "all" type: "Pooling" bottom: "conv" top: "all" pooling_param { global_pooling: true
  pool: AVE } }
layer { name: "zero" type: "Power" bottom: "ave" top: "zero" power_param { scale: 0 } }
layer { name: "quiet" type: "Silence" bottom: "zero" }
layer { name: "add" type: "Eltwise" bottom: "x" bottom: "x" top: "add" }
layer { name: "scale" type: "Scale" bottom: "add" top: "scale" }
layer { name: "norm" type: "LRN" bottom: "x" top: "norm" lrn_param { local_size: 3
  norm_region: WITHIN_CHANNEL } }
layer { name: "mvn" type: "MVN" bottom: "x" top: "mvn" }
layer { name: "spp" type: "SPP" bottom: "x" top: "spp" spp_param { pyramid_height: 2 } }
layer { name: "im" type: "Im2col" bottom: "x" top: "im" convolution_param { kernel_size: 2 } }
"""


@pytest.mark.parametrize("size", [(8, 6), (2, 4), (6, 13)])
def test_every_pass_has_the_shapes_of_its_own_images(size: tuple[int, int]):
    made = net(SIZES)
    image = torch.rand(1, 2, *size)
    made({"x": image})
    there = " ".join(f"dim: {one}" for one in image.shape)
    fresh = net(SIZES.replace("dim: 1 dim: 2 dim: 4 dim: 4", there))
    copy_weights(fresh, {
        step.layer.spec.name: dict(enumerate(blob.detach().numpy() for blob in step.layer.blobs()))
        for step in made.steps
    })  # fmt: skip
    found, wanted = made({"x": image}, keep=True).blobs, fresh({"x": image}, keep=True).blobs
    assert {name: tuple(blob.shape) for name, blob in found.items()} == fresh.shapes
    for name, blob in wanted.items():
        assert torch.equal(found[name], blob), name


UNFIT = {
    'layer { name: "it" type: "InnerProduct" bottom: "x" top: "y" '
    "inner_product_param { num_output: 1 } }": "has 24 values from axis 1 on, .* are for 16",
    'layer { name: "it" type: "Convolution" bottom: "x" top: "y" '
    "convolution_param { num_output: 1 kernel_size: 4 } }": "its kernel covers 4",
    'layer { name: "it" type: "Pooling" bottom: "x" top: "y" '
    "pooling_param { kernel_size: 4 } }": "its kernel of 4 is larger",
    'layer { name: "it" type: "Slice" bottom: "x" top: "a" top: "b" top: "c" top: "d" '
    "slice_param { axis: 2 } }": "3 cannot be cut into 4",
}


@pytest.mark.parametrize("layer", UNFIT)
def test_a_later_size_that_a_layer_cannot_take_is_refused_with_its_line(layer: str):
    source = (
        'layer { type: "Input" top: "x" input_param { shape { dim: 1 dim: 1 dim: 4 dim: 4 } } }'
    )
    made = net(f"{source}\n{layer}")
    with pytest.raises(ValueError, match=f"net.prototxt:2: layer 'it' .*{UNFIT[layer]}"):
        made({"x": torch.zeros(1, 1, 3, 8)})


DEPLOY = """
name: "deploy"
layer { name: "data" type: "Input" top: "data"
  input_param { shape { dim: 2 dim: 3 dim: 15 dim: 14 } } }
layer { name: "c1" type: "Convolution" bottom: "data" top: "c1" convolution_param {
  num_output: 8 kernel_size: 3 pad: 1 weight_filler { type: "msra" } bias_filler { value: 0.1 } } }
layer { name: "bn" type: "BatchNorm" bottom: "c1" top: "bn" }
layer { name: "sc" type: "Scale" bottom: "bn" top: "sc" scale_param { bias_term: true
  filler { type: "uniform" min: 0.5 max: 2 } bias_filler { type: "gaussian" } } }
layer { name: "r1" type: "ReLU" bottom: "sc" top: "sc" relu_param { negative_slope: 0.1 } }
layer { name: "p1" type: "Pooling" bottom: "sc" top: "p1"
  pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "n1" type: "LRN" bottom: "p1" top: "n1" lrn_param { alpha: 0.1 } }
layer { name: "c2" type: "Convolution" bottom: "n1" top: "c2" convolution_param {
  num_output: 8 group: 2 kernel_size: 3 dilation: 2 pad: 2 weight_filler { type: "xavier" } } }
layer { name: "sum" type: "Eltwise" bottom: "c2" bottom: "n1" top: "sum"
  eltwise_param { coeff: [1, -0.5] } }
layer { name: "p2" type: "Pooling" bottom: "sum" top: "p2"
  pooling_param { pool: AVE kernel_size: 2 stride: 2 pad: 1 } }
layer { name: "cat" type: "Concat" bottom: "p2" bottom: "p2" top: "cat" }
layer { name: "fc" type: "InnerProduct" bottom: "cat" top: "fc" inner_product_param {
  num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""


EXAMPLES = Path(__file__).parents[3] / "examples" / "caffe"


def test_the_example_has_the_full_shape_of_alexnet():
    made = Net(prototxt.read_net(EXAMPLES / "alexnet_train_val.prototxt"), "TRAIN")
    assert sum(blob.tensor.numel() for blob in made.stored) == 60_965_224
    assert made.shapes["pool5"] == (8, 256, 6, 6)
    for name in ("alexnet", "cifar", "lenet"):
        solver = prototxt.read_solver(EXAMPLES / f"{name}_solver.prototxt")
        assert prototxt.read_net(EXAMPLES / solver.net).layer


def test_opencv_reads_our_files_and_finds_the_same_result(tmp_path: Path):
    made = Net(parse(DEPLOY, "NetParameter"), "TEST", generator=torch.Generator().manual_seed(1))
    batch_norm = made.layers["bn"]
    batch_norm.mean.uniform_(-1, 1)
    batch_norm.variance.uniform_(1, 3)
    batch_norm.scale.fill_(2)
    model, definition = tmp_path / "d.caffemodel", tmp_path / "d.prototxt"
    weights.write_message(model, made.to_message())
    definition.write_text(text.write(parse(DEPLOY, "NetParameter")))
    other = cv2.dnn.readNetFromCaffe(str(definition), str(model))
    x = torch.rand(2, 3, 15, 14, generator=torch.Generator().manual_seed(2))
    other.setInput(x.numpy())
    found = made({"data": x}).outputs["prob"].detach().numpy()
    np.testing.assert_allclose(found, other.forward(), atol=1e-5)
    assert wire.decode(model.read_bytes(), "NetParameter") == made.to_message()
    assert isinstance(made.to_message(), Message)
