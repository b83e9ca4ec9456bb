"""Each layer beside real Caffe: what it gives, and every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import golden_caffe as golden
from soonest.caffe.layers.pooling import windows
from soonest.caffe.net.net import Net
from soonest.caffe.net.registry import LAYERS
from soonest.caffe.proto.text import parse

CASES: dict[tuple[Path, str], Any] = {
    (folder, name): case
    for folder in (golden.FOLDER, golden.SECOND)
    for name, case in golden.index("layers/index.json", folder)["cases"].items()
}
TOLERANCE = 1e-5
"""Of the largest value, or of 1."""


def net(source: str, phase: str = "TRAIN") -> Net:
    return Net(parse(source, "NetParameter"), phase, file="net.prototxt")


def inputs(**shapes: list[int]) -> str:
    """Input layers of these shapes."""
    return "".join(
        f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{ '
        + " ".join(f"dim: {size}" for size in shape)
        + " } } }\n"
        for name, shape in shapes.items()
    )


def test_there_are_cases_of_every_layer():
    read = golden.index("data/index.json", golden.SECOND)["cases"]  # Others run these.
    types = {type_ for case in [*CASES.values(), *read.values()] for type_ in case["types"]}
    # HDF5Data is in trainings, HDF5Output in logs.
    others = {"DummyData", "HDF5Data", "HDF5Output", "Input", "Python", "Threshold"}
    assert set(LAYERS) - types == others


@pytest.mark.parametrize(("folder", "name"), CASES, ids=[name for _, name in CASES])
def test_a_layer_gives_what_caffe_gives(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder / "layers")
    compared = 0
    for key, found, wanted in golden.layer_arrays(name, folder):
        assert found.shape == wanted.shape, key
        apart = np.abs(found - wanted).max()
        assert apart <= TOLERANCE * max(1, np.abs(wanted).max()), key
        compared += 1
    assert compared


WRONG = {
    "convolution_param { num_output: 2 }": "kernel_size is given 0 times",
    "convolution_param { num_output: 2 kernel_size: [1, 2, 3] }": "kernel_size is given 3 times",
    "convolution_param { kernel_size: 1 }": "num_output and group",
    "convolution_param { num_output: 2 kernel_size: 1 group: 2 }": "group 2 must divide",
    "convolution_param { num_output: 2 kernel_size: 9 }": "its kernel covers 9",
    "convolution_param { num_output: 2 kernel_size: 1 kernel_h: 1 }": "no kernel_size beside",
    "convolution_param { num_output: 2 kernel_size: 1 axis: 4 }": "axis 4 is not one of",
    "pooling_param { }": "give a kernel_size",
    "pooling_param { kernel_size: 1 kernel_h: 2 }": "give kernel_size, or both",
    "pooling_param { kernel_size: 9 }": "larger than its bottom",
    "pooling_param { kernel_size: 2 pad: 2 }": "must be below its kernel",
    "pooling_param { kernel_size: 1 stride: 4 }": "outside of the 6 values",
    "pooling_param { pool: STOCHASTIC kernel_size: 2 pad: 1 }": "has no padding",
    "pooling_param { global_pooling: true kernel_size: 2 }": "leave it out",
    "lrn_param { local_size: 4 }": "give an odd one",
    "dropout_param { dropout_ratio: 1 }": "0 or more, below 1",
    "exp_param { base: 0 }": "above 0, or -1",
    "reshape_param { shape { dim: 5 } }": "cannot be reshaped",
    "reshape_param { shape { dim: -1 dim: -1 } }": "or once -1",
    "reshape_param { axis: 9 }": "axis 9",
    "flatten_param { axis: 2 end_axis: 1 }": "before its axis",
    "slice_param { slice_point: 9 }": "rising, between 0 and 3",
    "argmax_param { axis: 1 top_k: 4 }": "give 1 to 3",
    "tile_param { tiles: 0 }": "give 1 or more",
    "scale_param { num_axes: 7 }": "more than there are",
    "inner_product_param { num_output: 0 }": "sizes above 0",
    'inner_product_param { num_output: 1 weight_filler { type: "best" } }': "no filler 'best'",
    'inner_product_param { num_output: 1 weight_filler { type: "bilinear" } }': "square filters",
    'inner_product_param { num_output: 1 weight_filler { type: "xavier" sparse: 1 } }': "sparse",
}
TOPS = {"": 'top: "y"', "slice": 'top: "y" top: "z"'}
TYPES = {"lrn": "LRN", "argmax": "ArgMax", "inner_product": "InnerProduct"}


@pytest.mark.parametrize("spec", WRONG)
def test_what_cannot_be_is_refused_with_the_line_of_the_layer(spec: str):
    kind = spec.partition("_param")[0]
    source = inputs(x=[2, 3, 6, 6]) + (
        f'layer {{ name: "it" type: "{TYPES.get(kind, kind.title())}" bottom: "x" '
        f"{TOPS.get(kind, TOPS[''])} {spec} }}"
    )
    with pytest.raises(ValueError, match=WRONG[spec]) as caught:
        net(source)
    assert str(caught.value).startswith("net.prototxt:2: layer 'it' of type ")


TWO = {
    ("Concat", (2, 3, 4), (2, 3, 5)): "equal but for axis 1",
    ("Eltwise", (2, 3), (3, 2)): "several shapes",
    ("SoftmaxWithLoss", (2, 3, 4), (2,)): "it has 2 labels",
    ("EuclideanLoss", (2, 3), (2, 4)): "equally many",
    ("Scale", (2, 3), (4,)): "does not fit",
    ("Crop", (2, 3, 4, 4), (2, 3, 5, 5)): "leaves too little",
    ("ContrastiveLoss", (2, 3), (2, 3)): "it takes 3",
    ("ReLU", (2, 3), (2, 3)): "it takes 1",
}


@pytest.mark.parametrize("case", TWO)
def test_bottoms_that_do_not_fit_are_refused(case: tuple[str, tuple[int, ...], tuple[int, ...]]):
    kind, first, second = case
    source = inputs(a=list(first), b=list(second)) + (
        f'layer {{ name: "it" type: "{kind}" bottom: "a" bottom: "b" top: "y" }}'
    )
    with pytest.raises(ValueError, match=TWO[case]):
        net(source)


def test_labels_out_of_range_are_refused_with_the_layer():
    made = net(
        inputs(a=[2, 3], b=[2])
        + 'layer { name: "it" type: "SoftmaxWithLoss" bottom: "a" bottom: "b" }'
    )
    with pytest.raises(ValueError, match=r"layer 'it' .*a label is 7"):
        made({"b": torch.tensor([1.0, 7.0])})


@pytest.mark.parametrize("score", [200.0, 1e5, 1e8, 1e30, 3e38])
def test_the_loss_of_a_hopeless_score_is_capped_but_its_gradient_is_not(score: float):
    made = net(
        inputs(a=[1, 2], b=[1])
        + 'layer { name: "it" type: "SoftmaxWithLoss" bottom: "a" bottom: "b" }'
    )
    scores = torch.tensor([[0.0, score]], requires_grad=True)
    loss = made({"a": scores}).loss
    loss.backward()
    assert loss.item() == pytest.approx(87.3365, abs=1e-4)
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-1, 1]]


def test_the_loss_of_no_numbers_is_none():
    made = net(
        inputs(a=[1, 2], b=[1]) + 'layer { type: "SoftmaxWithLoss" bottom: "a" bottom: "b" }'
    )
    assert made({"a": torch.tensor([[0.0, float("nan")]])}).loss.isnan()


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad", "ceil", "wanted"),
    [(55, 3, 2, 0, True, 27), (6, 3, 2, 0, True, 3), (6, 3, 2, 0, False, 2), (4, 2, 2, 1, True, 3),
     (5, 2, 2, 1, True, 3), (7, 1, 2, 0, True, 4), (8, 1, 2, 0, False, 4), (1, 2, 2, 0, True, 1),
     (2, 3, 2, 0, True, 1), (3, 4, 2, 0, True, 1), (6, 7, 7, 0, True, 1)],
)  # fmt: skip
def test_the_number_of_windows(
    size: int, kernel: int, stride: int, pad: int, ceil: bool, wanted: int
):
    assert windows(size, kernel, stride, pad, ceil=ceil) == wanted


def test_the_mask_of_max_pooling_counts_without_padding():
    made = net(
        inputs(x=[1, 1, 3, 3]) + 'layer { type: "Pooling" bottom: "x" top: "y" top: "mask" '
        "pooling_param { kernel_size: 2 stride: 2 pad: 1 } }"
    )
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    result = made({"x": x})
    assert torch.equal(x.flatten()[result.outputs["mask"].long()], result.outputs["y"])


def test_dropout_keeps_the_mean():
    made = net(
        inputs(x=[1000, 10]) + 'layer { type: "Dropout" bottom: "x" top: "x" '
        "dropout_param { dropout_ratio: 0.25 } }"
    )
    values = made({"x": torch.ones(1000, 10)}).outputs["x"]
    assert set(values.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert values.mean().item() == pytest.approx(1, abs=0.05)


def test_dropout_of_nothing_changes_nothing():
    made = net(
        inputs(x=[2, 3]) + 'layer { type: "Dropout" bottom: "x" top: "x" '
        "dropout_param { dropout_ratio: 0 } }"
    )
    assert torch.equal(made({"x": torch.ones(2, 3)}).outputs["x"], torch.ones(2, 3))


def test_local_response_within_channels_ignores_k():
    def top(k: int) -> torch.Tensor:
        made = net(
            inputs(x=[1, 2, 4, 4]) + 'layer { type: "LRN" bottom: "x" top: "y" lrn_param { '
            f"norm_region: WITHIN_CHANNEL local_size: 3 alpha: 9 k: {k} }} }}"
        )
        return made({"x": torch.ones(1, 2, 4, 4)}).outputs["y"]

    assert torch.equal(top(1), top(5))
    inner, corner = top(5)[0, 0, 1, 1].item(), top(5)[0, 0, 0, 0].item()
    assert (inner, corner) == pytest.approx((10**-0.75, 5**-0.75))


def test_a_hinge_at_its_margin_has_no_gradient():
    made = net(inputs(a=[1, 2], b=[1]) + 'layer { type: "HingeLoss" bottom: "a" bottom: "b" }')
    scores = torch.tensor([[1.0, -1.0]], requires_grad=True)
    made({"a": scores}).loss.backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0, 0]]


def test_threshold_and_silence():
    made = net(
        inputs(x=[1, 3])
        + 'layer { type: "Threshold" bottom: "x" top: "y" threshold_param { threshold: 2 } }\n'
        'layer { type: "Silence" bottom: "x" }'
    )
    result = made({"x": torch.tensor([[1.0, 2.0, 3.0]])})
    assert {name: blob.tolist() for name, blob in result.outputs.items()} == {"y": [[0, 0, 1]]}


def test_inputs_and_dummy_data_in_every_form():
    made = net(
        'layer { type: "Input" top: "a" top: "b" input_param { shape { dim: 2 } } }\n'
        'layer { type: "Input" top: "c" top: "d" '
        "input_param { shape { dim: 1 dim: 2 } shape { dim: 3 } } }\n"
        'layer { type: "DummyData" top: "e" top: "f" dummy_data_param { num: 2 num: 3 '
        "channels: 1 height: 4 width: 5 data_filler { value: 7 } } }\n"
        'layer { type: "DummyData" top: "g" dummy_data_param { shape { dim: 4 } } }\n'
    )
    assert made.shapes == {
        "a": (2,), "b": (2,), "c": (1, 2), "d": (3,), "e": (2, 1, 4, 5), "f": (3, 1, 4, 5),
        "g": (4,),
    }  # fmt: skip
    outputs = made({"d": torch.ones(3)}).outputs
    values = {name: blob.unique().tolist() for name, blob in outputs.items()}
    assert values == {"a": [0], "b": [0], "c": [0], "d": [1], "e": [7], "f": [7], "g": [0]}


MADE_UP = {
    "num: 2 channels: 1 height: 4": "give shape, or each of num",
    "shape { dim: 1 } num: 1": "give shape, or each of num",
    "shape { dim: 1 } shape { dim: 2 } shape { dim: 3 }": "it has 3 shapes",
    "shape { dim: 1 } data_filler { } data_filler { } data_filler { }": "it has 3 fillers",
    'shape { dim: 1 } data_filler { type: "best" }': "no filler 'best'",
}


@pytest.mark.parametrize("spec", MADE_UP)
def test_dummy_data_that_cannot_be_is_refused(spec: str):
    source = 'layer { name: "it" type: "DummyData" top: "x" top: "y" dummy_data_param { SPEC } }'
    with pytest.raises(ValueError, match=f"layer 'it' .*{MADE_UP[spec]}"):
        net(source.replace("SPEC", spec))


def test_an_old_batch_norm_of_scale_0_has_mean_and_variance_0():
    made = net(inputs(x=[2, 3]) + 'layer { type: "BatchNorm" bottom: "x" top: "y" }', "TEST")
    top = made({"x": torch.full((2, 3), 2.0)}).outputs["y"]
    assert top.flatten().tolist() == pytest.approx([2 / 1e-5**0.5] * 6)


def test_a_clip_whose_min_is_above_its_max_gives_the_min():
    made = net(
        inputs(x=[3]) + 'layer { type: "Clip" bottom: "x" top: "y" clip_param { min: 2 max: 1 } }'
    )
    assert made({"x": torch.tensor([0.0, 1.5, 3.0])}).outputs["y"].tolist() == [2, 2, 2]


def test_dropout_of_all_is_taken_where_nothing_is_dropped():
    source = inputs(x=[2]) + 'layer { type: "Dropout" bottom: "x" dropout_param '
    source += '{ dropout_ratio: 1 } top: "y" }'
    assert net(source, "TEST")({"x": torch.ones(2)}).outputs["y"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="dropout_ratio is 1"):
        net(source)


def test_batch_norm_of_one_value_a_channel_gives_nothing_and_takes_the_mean():
    made = net(inputs(x=[1, 3]) + 'layer { name: "b" type: "BatchNorm" bottom: "x" top: "y" }')
    x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    top = made({"x": x}).outputs["y"]
    top.sum().backward()
    assert top.tolist() == [[0, 0, 0]]
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 0]]
    layer = made.layers["b"]
    assert [layer.mean.tolist(), layer.variance.tolist()] == [[1, 2, 3], [0, 0, 0]]


def test_running_statistics_take_nothing_from_memory_that_was_not_written() -> None:
    made = net(inputs(x=[4, 3]) + 'layer { name: "b" type: "BatchNorm" bottom: "x" top: "y" }')
    torch.use_deterministic_algorithms(True)  # memory that was not written is NaN then
    try:
        made({"x": torch.randn(4, 3)})
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(blob.isfinite().all() for blob in made.layers["b"].blobs())
