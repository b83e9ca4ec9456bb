"""Layers beside what torch and OpenCV have of the same, for any sizes and settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from soonest.caffe.data.windows import placed
from soonest.caffe.net.net import Net
from soonest.caffe.proto.text import parse

FEW = st.integers(1, 4)
SEED = st.integers(0, 2**31)


def layer(kind: str, spec: str, bottoms: Mapping[str, Tensor], tops: int = 1, phase: str = "TRAIN"):
    """The layer and a function that runs it, on bottoms of these shapes."""
    source = "".join(
        f'layer {{ type: "Input" top: "{name}" input_param {{ shape {{ '
        + " ".join(f"dim: {size}" for size in blob.shape)
        + " } } }\n"
        for name, blob in bottoms.items()
    )
    source += f'layer {{ name: "it" type: "{kind}" {spec} '
    source += " ".join(f'bottom: "{name}"' for name in bottoms)
    source += " ".join(f' top: "t{number}"' for number in range(tops)) + " }"
    made = Net(parse(source, "NetParameter"), phase)

    def run() -> list[Tensor]:
        blobs = made(bottoms, keep=True).blobs
        return [blobs[f"t{number}"] for number in range(tops)]

    return made.layers["it"], run


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def filled(one: Any) -> list[Tensor]:
    """The layer's blobs, with noise in them."""
    with torch.no_grad():
        for blob in one.blobs():
            blob.normal_()
    return one.blobs()


def same(found: list[Tensor], wanted: list[Tensor], sources: list[tuple[Tensor, Tensor]]) -> None:
    """Compares tops, and gradients of a random sum of them, of pairs of tensors."""
    sent = [torch.randn_like(top) for top in wanted]
    torch.autograd.backward(found, sent)
    torch.autograd.backward(wanted, sent)
    pairs = zip(found, wanted, strict=True)
    grads = ((mine.grad, theirs.grad) for mine, theirs in sources)
    for mine, theirs in [*pairs, *grads]:
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@given(steps=FEW, streams=FEW, inputs=FEW, width=FEW, seed=SEED)
@settings(max_examples=25)
def test_lstm_is_that_of_torch(steps: int, streams: int, inputs: int, width: int, seed: int):
    torch.manual_seed(seed)
    x, cont = noise(steps, streams, inputs), torch.ones(steps, streams)
    spec = f"recurrent_param {{ num_output: {width} }}"
    mine, run = layer("LSTM", spec, {"x": x, "cont": cont})
    from_input, bias, from_state = filled(mine)
    theirs = nn.LSTM(inputs, width)
    order = [0, 1, 3, 2]  # Torch has what is new before the gate out.
    with torch.no_grad():
        for name, blob in {"weight_ih_l0": from_input, "weight_hh_l0": from_state,
                           "bias_ih_l0": bias}.items():  # fmt: skip
            parts = blob.chunk(4)
            getattr(theirs, name).copy_(torch.cat([parts[place] for place in order]))
        theirs.bias_hh_l0.zero_()
    y = x.detach().clone().requires_grad_()
    first, states = theirs(y)
    same(run(), [first], [(x, y)])
    again, _ = theirs(y, tuple(state.detach() for state in states))
    torch.testing.assert_close(run(), [again], atol=1e-4, rtol=1e-4)  # It goes on from there.


@given(steps=FEW, streams=FEW, inputs=FEW, width=FEW, seed=SEED)
@settings(max_examples=25)
def test_rnn_is_that_of_torch(steps: int, streams: int, inputs: int, width: int, seed: int):
    torch.manual_seed(seed)
    x, cont = noise(steps, streams, inputs), torch.ones(steps, streams)
    mine, run = layer("RNN", f"recurrent_param {{ num_output: {width} }}", {"x": x, "cont": cont})
    from_input, bias, from_state, to_output, output_bias = filled(mine)
    theirs = nn.RNN(inputs, width)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(from_input)
        theirs.weight_hh_l0.copy_(from_state)
        theirs.bias_ih_l0.copy_(bias)
        theirs.bias_hh_l0.zero_()
    y = x.detach().clone().requires_grad_()
    top = torch.tanh(functional.linear(theirs(y)[0], to_output.detach(), output_bias.detach()))
    same(run(), [top], [(x, y)])


def test_a_stream_that_starts_anew_forgets():
    torch.manual_seed(0)
    x, cont = noise(4, 2, 3), torch.ones(4, 2)
    cont[2, 1] = 0
    mine, run = layer("LSTM", "recurrent_param { num_output: 5 }", {"x": x, "cont": cont})
    filled(mine)
    found = run()[0]
    alone, run_alone = layer(
        "LSTM", "recurrent_param { num_output: 5 }", {"x": x[2:, 1:], "cont": torch.ones(2, 1)}
    )
    for blob, other in zip(alone.blobs(), mine.blobs(), strict=True):
        blob.data.copy_(other)
    torch.testing.assert_close(found[2:, 1:], run_alone()[0])


def test_fewer_streams_go_on_from_the_first_and_more_start_anew():
    layer_, _ = layer(
        "RNN", "recurrent_param { num_output: 2 }", {"x": noise(1, 3, 1), "cont": torch.ones(1, 3)}
    )
    filled(layer_)
    x = torch.zeros(1, 3, 1)
    first = layer_(x, torch.ones(1, 3))
    second = layer_(x[:, :2], torch.ones(1, 2))
    layer_._memory.clear()
    layer_(x, torch.ones(1, 3))
    torch.testing.assert_close(layer_(x, torch.ones(1, 3))[:, :2], second)
    torch.testing.assert_close(layer_(torch.zeros(1, 9, 1), torch.ones(1, 9))[:, 2], first[:, 0])


@given(width=FEW, streams=FEW, seed=SEED)
@settings(max_examples=10)
def test_lstm_unit_is_a_cell_of_torch(width: int, streams: int, seed: int):
    torch.manual_seed(seed)
    cell, gates = noise(1, streams, width), noise(1, streams, 4 * width)
    bottoms = {"c": cell, "x": gates, "cont": torch.ones(1, streams)}
    _, run = layer("LSTMUnit", "", bottoms, tops=2)
    theirs = nn.LSTMCell(4 * width, width, bias=False)
    with torch.no_grad():
        rows = torch.arange(4 * width).reshape(4, width)[[0, 1, 3, 2]].flatten()
        theirs.weight_ih.copy_(torch.eye(4 * width)[rows])
        theirs.weight_hh.zero_()
    own = [one.detach().clone().requires_grad_() for one in (cell, gates)]
    hidden, after = theirs(own[1][0], (torch.zeros(streams, width), own[0][0]))
    same(run(), [after[None], hidden[None]], list(zip((cell, gates), own, strict=True)))


WINDOWS = st.fixed_dictionaries(
    {"kernel_size": st.integers(1, 3), "stride": st.integers(1, 3), "pad": st.integers(0, 2),
     "dilation": st.integers(1, 2)}
)  # fmt: skip


@given(settings_=WINDOWS, seed=SEED)
@settings(max_examples=40)
def test_im2col_is_unfold_and_what_a_convolution_multiplies(settings_: dict[str, int], seed: int):
    torch.manual_seed(seed)
    x, fields = noise(2, 3, 7, 6), " ".join(f"{key}: {one}" for key, one in settings_.items())
    _, run = layer("Im2col", f"convolution_param {{ {fields} }}", {"x": x})
    y = x.detach().clone().requires_grad_()
    own = functional.unfold(
        y, settings_["kernel_size"], settings_["dilation"], settings_["pad"], settings_["stride"]
    )
    found = run()
    same(found, [own.reshape(found[0].shape)], [(x, y)])
    conv, run_conv = layer(
        "Convolution", f"convolution_param {{ num_output: 2 bias_term: false {fields} }}", {"x": x}
    )
    (weight,) = filled(conv)
    product = torch.einsum("oc,ncyx->noyx", weight.flatten(1), found[0])
    torch.testing.assert_close(run_conv()[0], product, atol=1e-4, rtol=1e-4)


@given(height=st.integers(4, 9), width=st.integers(4, 9), seed=SEED)
@settings(max_examples=20)
def test_a_pyramid_is_poolings_side_by_side(height: int, width: int, seed: int):
    torch.manual_seed(seed)
    x = noise(2, 3, height, width)
    try:
        _, run = layer("SPP", "spp_param { pyramid_height: 2 }", {"x": x})
    except ValueError as error:
        assert "lower pyramid_height" in str(error)  # noqa: PT017
        return
    y = x.detach().clone().requires_grad_()
    half = [(-(-one // 2), (one % 2 + 1) // 2) for one in (height, width)]
    four = functional.max_pool2d(
        y, (half[0][0], half[1][0]), padding=(half[0][1] if height % 2 else 0,
                                              half[1][1] if width % 2 else 0), ceil_mode=True
    )  # fmt: skip
    wanted = torch.cat([y.amax((2, 3)), four[:, :, :2, :2].flatten(1)], 1)
    same(run(), [wanted], [(x, y)])


@given(seed=SEED, ignored=st.booleans(), mode=st.sampled_from(["VALID", "FULL", "NONE"]))
@settings(max_examples=20)
def test_information_gained_of_the_label_alone_is_the_softmax_loss(
    seed: int, ignored: bool, mode: str
):
    torch.manual_seed(seed)
    x, labels = noise(3, 4, 2), torch.randint(4, (3, 2)).float()
    spec = f"loss_param {{ {'ignore_label: 1' if ignored else ''} normalization: {mode} }}"
    bottoms = {"x": x, "label": labels, "h": torch.eye(4)}
    y = x.detach().clone().requires_grad_()
    _, run = layer("InfogainLoss", spec, bottoms)
    _, other = layer("SoftmaxWithLoss", spec, {"x": y, "label": labels})
    same(run(), other(), [(x, y)])


@given(
    seed=SEED, group=st.sampled_from([1, 2]), kind=st.sampled_from(["Convolution", "Deconvolution"])
)
@settings(max_examples=10)
def test_a_convolution_without_spatial_axes_is_a_product(seed: int, group: int, kind: str):
    torch.manual_seed(seed)
    x = noise(5, 4)
    spec = f"convolution_param {{ num_output: 6 group: {group} }}"
    mine, run = layer(kind, spec, {"x": x})
    weight, bias = filled(mine)
    parts = weight.chunk(group)
    whole = torch.block_diag(*(part.t() if kind == "Convolution" else part for part in parts))
    torch.testing.assert_close(run()[0], x @ whole + bias, atol=1e-4, rtol=1e-4)


def test_stochastic_pooling_draws_as_often_as_values_are_large_and_tests_with_the_mean():
    torch.manual_seed(3)
    x = torch.rand(1, 1, 3, 3).expand(2000, 1, 3, 3).clone().requires_grad_()
    spec = "pooling_param { pool: STOCHASTIC kernel_size: 2 stride: 2 }"
    drawn = layer("Pooling", spec, {"x": x})[1]()[0]
    mean = layer("Pooling", spec, {"x": x[:1]}, phase="TEST")[1]()[0]
    torch.testing.assert_close(drawn.mean(0, keepdim=True), mean, atol=0.03, rtol=0)
    window = x[0, 0, :2, :2]
    assert mean[0, 0, 0, 0].item() == pytest.approx((window**2).sum().item() / window.sum().item())
    drawn.sum().backward()
    assert x.grad is not None
    assert x.grad.sum().item() == drawn.numel()
    assert set(drawn[:, 0, 0, 0].tolist()) == set(window.flatten().tolist())


def test_filter_and_reindex_pick_as_indexing_does():
    x, other = noise(4, 2), noise(4, 3)
    pick = torch.tensor([0.0, 2.0, 0.0, 1.0]).reshape(4, 1)
    _, run = layer("Filter", "", {"x": x, "other": other, "pick": pick}, tops=2)
    rows = torch.tensor([1, 3])
    assert [torch.equal(a, b[rows]) for a, b in zip(run(), (x, other), strict=True)] == [True] * 2
    _, run = layer("Filter", "", {"x": x, "pick": torch.zeros(4)})
    assert run()[0].shape == (0, 2)
    order = torch.tensor([3.0, 3, 0])
    _, run = layer("BatchReindex", "", {"x": x, "order": order})
    top = run()[0]
    top.sum().backward()
    assert torch.equal(top, x[order.long()])
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1], [0, 0], [0, 0], [2, 2]]


def test_a_window_is_what_opencv_cuts_out(tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (tmp_path / "list").write_text(f"# 0 {tmp_path}/a.png 3 20 30 1 5 0.9 4 3 15 12")
    source = (
        'layer { type: "WindowData" top: "x" top: "y" transform_param { crop_size: 8 scale: 2 } '
        f'window_data_param {{ source: "{tmp_path}/list" batch_size: 1 fg_fraction: 1 }} }}'
    )
    made = Net(parse(source, "NetParameter"), "TEST")
    blobs = made(keep=True).blobs
    made.close()
    wanted = cv2.resize(image[3:13, 4:16], (8, 8)).transpose(2, 0, 1).astype(np.float32) * 2
    assert np.array_equal(blobs["x"][0].numpy(), wanted)
    assert blobs["y"].tolist() == [5]


@given(
    left=st.integers(0, 20), top=st.integers(0, 20), width=st.integers(1, 20),
    height=st.integers(1, 20), pad=st.integers(0, 3), square=st.booleans(),
)  # fmt: skip
def test_a_window_and_what_is_around_it_fit(
    left: int, top: int, width: int, height: int, pad: int, square: bool
):
    corners = (left, top, left + width - 1, top + height - 1)
    place = placed(corners, (40, 40), 12, pad, square=square)
    x1, y1, x2, y2 = place.inside
    assert 0 <= x1 <= x2 < 40
    assert 0 <= y1 <= y2 < 40
    assert 0 < place.height <= 12 - place.above
    assert 0 < place.width <= 12 - place.before
