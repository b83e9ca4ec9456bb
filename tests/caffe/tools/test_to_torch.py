"""Nets of Caffe as modules of plain torch: the same outputs, and torch can export them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from soonest.caffe.io import prototxt
from soonest.caffe.io.weights import write_message
from soonest.caffe.net.net import Net
from soonest.caffe.tools import to_torch
from soonest.cli import main

W = 'weight_filler { type: "xavier" } bias_filler { type: "gaussian" std: 0.1 }'


def layer(name: str, type_: str, rest: str = "", bottom: str = "", top: str = "") -> str:
    bottoms = " ".join(f'bottom: "{one}"' for one in bottom.split())
    tops = " ".join(f'top: "{one}"' for one in (top or name).split())
    return f'layer {{ name: "{name}" type: "{type_}" {bottoms} {tops} {rest} }}\n'


def data(*shape: int, name: str = "data") -> str:
    dims = " ".join(f"dim: {one}" for one in shape)
    return layer(name, "Input", f"input_param {{ shape {{ {dims} }} }}")


def conv(name: str, bottom: str, outputs: int, rest: str = "kernel_size: 3") -> str:
    own = f"convolution_param {{ num_output: {outputs} {rest} {W} }}"
    return layer(name, "Convolution", own, bottom)


def full(name: str, bottom: str, outputs: int, more: str = "") -> str:
    own = f"inner_product_param {{ num_output: {outputs} {W} }} {more}"
    return layer(name, "InnerProduct", own, bottom)


def pool(name: str, bottom: str, rest: str) -> str:
    return layer(name, "Pooling", f"pooling_param {{ {rest} }}", bottom)


def normal(name: str, bottom: str) -> str:
    return layer(name, "BatchNorm", "", bottom) + layer(
        f"{name}/scale", "Scale", f"scale_param {{ bias_term: true {'filler { value: 0.7 }'} }}",
        name, name,
    )  # fmt: skip


NETS = {
    "lenet": data(2, 1, 28, 28) + conv("conv1", "data", 5, "kernel_size: 5")
    + pool("pool1", "conv1", "pool: MAX kernel_size: 2 stride: 2") + full("ip1", "pool1", 20)
    + layer("relu1", "ReLU", "", "ip1", "ip1") + full("ip2", "ip1", 10)
    + layer("prob", "Softmax", "", "ip2"),
    "alexnet": data(2, 3, 51, 51) + conv("conv1", "data", 8, "kernel_size: 11 stride: 4")
    + layer("relu1", "ReLU", "", "conv1", "conv1")
    + layer("norm1", "LRN", "lrn_param { local_size: 5 alpha: 0.1 beta: 0.75 k: 2 }", "conv1")
    + pool("pool1", "norm1", "kernel_size: 3 stride: 2")
    + conv("conv2", "pool1", 6, "kernel_size: 5 pad: 2 group: 2") + full("fc6", "conv2", 12)
    + layer("drop6", "Dropout", "dropout_param { dropout_ratio: 0.4 }", "fc6", "fc6")
    + layer("prob", "Softmax", "", "fc6"),
    "resnet": data(2, 3, 17, 17)
    + conv("conv1", "data", 6, "kernel_size: 3 pad: 1 bias_term: false")
    + normal("bn1", "conv1") + layer("relu1", "ReLU", "", "bn1", "bn1")
    + conv("res2a", "bn1", 6, "kernel_size: 3 pad: 1") + normal("bn2a", "res2a")
    + layer("sum", "Eltwise", "", "bn2a bn1")
    + pool("pool5", "sum", "pool: AVE global_pooling: true") + full("fc", "pool5", 4),
    "inception": data(1, 4, 14, 14) + conv("a.1x1", "data", 3, "kernel_size: 1")
    + conv("b/3x3", "data", 4, "kernel_size: 3 pad: 1")
    + pool("c-pool", "data", "pool: MAX kernel_size: 3 stride: 1 pad: 1")
    + layer("out", "Concat", "", "a.1x1 b/3x3 c-pool")
    + pool("ave", "out", "pool: AVE kernel_size: 3 stride: 2 pad: 1"),
    "fcn": data(1, 3, 19, 23) + conv("score", "data", 4, "kernel_size: 3 stride: 2 pad: 1")
    + layer("up", "Deconvolution", "convolution_param { num_output: 4 kernel_size: 4 stride: 2 "
            'group: 4 bias_term: false weight_filler { type: "bilinear" } }', "score")
    + layer("crop", "Crop", "crop_param { axis: 2 offset: 1 }", "up data")
    + layer("best", "ArgMax", "argmax_param { axis: 1 }", "crop"),
    "siamese": data(3, 6) + data(3, 6, name="other")
    + full("f", "data", 4, 'param { name: "w" } param { name: "b" }')
    + full("g", "other", 4, 'param { name: "w" } param { name: "b" }')
    + layer("far", "Eltwise", "eltwise_param { operation: SUM coeff: 1 coeff: -1 }", "f g")
    + layer("sum", "Reduction", "reduction_param { operation: SUMSQ axis: 1 coeff: 0.5 }", "far"),
    "activations": data(2, 3, 5, 5)
    + layer("abs", "AbsVal", "", "data") + layer("bnll", "BNLL", "", "abs")
    + layer("elu", "ELU", "elu_param { alpha: 0.3 }", "bnll")
    + layer("power", "Power", "power_param { power: 2 scale: 0.5 shift: 1 }", "elu")
    + layer("log", "Log", "log_param { base: 2 shift: 1 }", "power")
    + layer("exp", "Exp", "exp_param { base: 2 scale: 0.5 shift: 0.1 }", "log")
    + layer("prelu", "PReLU", "", "exp") + layer("swish", "Swish", "", "prelu")
    + layer("clip", "Clip", "clip_param { min: 0.2 max: 3 }", "swish")
    + layer("tanh", "TanH", "", "clip") + layer("sigmoid", "Sigmoid", "", "tanh")
    + layer("leaky", "ReLU", "relu_param { negative_slope: 0.1 }", "sigmoid")
    + layer("step", "Threshold", "threshold_param { threshold: 0.6 }", "leaky"),
    "shapes": data(2, 6, 4, 5)
    + layer("cut", "Slice", "slice_param { slice_point: 2 }", "data", "first second")
    + layer("flat", "Flatten", "", "first")
    + layer("again", "Reshape", "reshape_param { shape { dim: 0 dim: 2 dim: -1 } }", "second")
    + layer("tiled", "Tile", "tile_param { axis: 1 tiles: 3 }", "flat")
    + layer("split", "Split", "", "tiled", "one two")
    + layer("product", "Eltwise", "eltwise_param { operation: PROD }", "one two")
    + layer("most", "Eltwise", "eltwise_param { operation: MAX }", "product one"),
    "normalising": data(2, 4, 7, 7)
    + layer("mvn", "MVN", "", "data")
    + layer("bias", "Bias", "bias_param { filler { value: 2 } }", "mvn")
    + layer("within", "LRN", "lrn_param { norm_region: WITHIN_CHANNEL local_size: 3 alpha: 0.5 }",
            "bias")
    + layer("gate", "Reduction", "reduction_param { operation: MEAN axis: 2 }", "within")
    + layer("gated", "Scale", "scale_param { axis: 0 }", "within gate"),
    "words": data(3, 4) + layer("embed", "Embed", "embed_param { input_dim: 5 num_output: 6 "
                               f"{W} }}", "data")
    + full("out", "embed", 3, ) + layer("soft", "Softmax", "", "out"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(name: str) -> Net:
    """A net with weights and statistics that are none of its defaults, in files of its name."""
    Path(f"{name}.prototxt").write_text(NETS[name])
    net = Net(prototxt.read_net(f"{name}.prototxt"), "TEST")
    torch.manual_seed(1)
    for step in net.steps:
        for blob in step.layer.blobs():
            if step.layer.spec.type == "BatchNorm":
                blob.copy_(torch.rand(blob.shape) + 0.5)
    write_message(f"{name}.caffemodel", net.to_message())
    return net


@pytest.mark.parametrize("name", NETS)
def test_a_net_gives_the_same_in_plain_torch_and_can_be_exported(name: str, folder: Path):
    net = made(name)
    command = ["caffe", "convert", "--to", "torch", f"{name}.prototxt", f"{name}.caffemodel"]
    assert main([*command, f"{name}_torch"]) == 0
    source = (folder / f"{name}_torch.py").read_text()
    assert "import soonest" not in source
    assert "from soonest" not in source
    module = to_torch.load(f"{name}_torch")
    inputs = {
        step.tops[0]: torch.randn(net.shapes[step.tops[0]]) if name != "words"
        else torch.randint(5, net.shapes[step.tops[0]]).float()
        for step in net.steps if step.layer.spec.type == "Input"
    }  # fmt: skip
    with torch.no_grad():
        wanted = list(net(inputs).outputs.values())
        found = module(*inputs.values())
        exported = torch.export.export(module, tuple(inputs.values())).module()(*inputs.values())
    for results in (found, exported):
        results = [results] if isinstance(results, torch.Tensor) else results
        for result, one in zip(results, wanted, strict=True):
            assert result.shape == one.shape
            assert (result - one).abs().max() <= 1e-5 * max(1, one.abs().max())


def test_shared_weights_stay_shared(folder: Path):
    made("siamese")
    to_torch.convert("siamese.prototxt", "siamese.caffemodel", "twins", say=lambda line: None)
    module = to_torch.load("twins")
    assert module.f.weight is module.g.weight
    assert len(list(module.parameters())) == 2


def test_losses_and_labels_are_left_out(folder: Path):
    source = data(2, 3) + data(2, name="label") + full("score", "data", 4)
    source += layer("loss", "SoftmaxWithLoss", "", "score label")
    NETS["trained"] = source
    made("trained")
    del NETS["trained"]
    said: list[str] = []
    to_torch.convert("trained.prototxt", "trained.caffemodel", "plain.pt", say=said.append)
    assert "Leaving out SoftmaxWithLoss loss" in said
    assert to_torch.load("plain")(torch.zeros(2, 3)).shape == (2, 4)


def test_what_torch_has_not_is_said_with_its_line(folder: Path, capsys: pytest.CaptureFixture[str]):
    NETS["padded"] = data(1, 1, 9, 9) + "\n" + pool("p", "data", "kernel_size: 3 pad: 2")
    made("padded")
    del NETS["padded"]
    assert main(["caffe", "convert", "padded.prototxt", "padded.caffemodel", "x"]) == 2
    assert "padded.prototxt:3: layer 'p'" in capsys.readouterr().err
