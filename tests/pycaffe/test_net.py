"""pycaffe's ``Net``: what scripts see of it, set in it, and run of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from soonest import pycaffe as caffe

DEPLOY = """
name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 5 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool"
  pooling_param { pool: MAX kernel_size: 2 stride: 2 } }
layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc"
  inner_product_param { num_output: 6 weight_filler { type: "xavier" } } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""  # noqa: E501


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> caffe.Net:
    monkeypatch.chdir(tmp_path)
    Path("deploy.prototxt").write_text(DEPLOY)
    caffe.set_random_seed(1)
    return caffe.Net("deploy.prototxt", caffe.TEST)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_it_is_described_as_in_caffe(net: caffe.Net):
    assert net.name == "small"
    assert (net.inputs, net.outputs) == (["data"], ["prob"])
    assert list(net.blobs) == ["data", "conv", "pool", "fc", "prob"]
    assert {name: blob.data.shape for name, blob in net.blobs.items()} == {
        "data": (4, 3, 8, 8), "conv": (4, 5, 6, 6), "pool": (4, 5, 3, 3), "fc": (4, 6),
        "prob": (4, 6),
    }  # fmt: skip
    assert {name: [one.data.shape for one in blobs] for name, blobs in net.params.items()} == {
        "conv": [(5, 3, 3, 3), (5,)], "fc": [(6, 45), (6,)],
    }  # fmt: skip
    assert [layer.type for layer in net.layers] == [
        "Input", "Convolution", "ReLU", "Pooling", "InnerProduct", "Softmax",
    ]  # fmt: skip
    assert net.layer_dict["conv"].blobs[0].data.shape == (5, 3, 3, 3)
    assert net.top_names["relu"] == net.bottom_names["relu"] == ["conv"]
    blob = net.blobs["conv"]
    assert (blob.num, blob.channels, blob.height, blob.width, blob.count) == (4, 5, 6, 6, 720)
    assert net.blob_loss_weights["prob"] == 0


def test_every_form_of_the_constructor_is_taken(net: caffe.Net):
    net.save("small.caffemodel")
    net.save("small.caffemodel.h5")
    for made in (
        caffe.Net("deploy.prototxt", "small.caffemodel", caffe.TEST),
        caffe.Net("deploy.prototxt", caffe.TEST, weights="small.caffemodel"),
        caffe.Net(network_file="deploy.prototxt", phase=caffe.TEST, weights="small.caffemodel.h5"),
        caffe.Net("deploy.prototxt", caffe.TEST, 0, ["deploy"], "small.caffemodel"),
    ):
        assert np.array_equal(made.params["fc"][0].data, net.params["fc"][0].data)
    with pytest.raises(ValueError, match=r"caffe\.TRAIN or caffe\.TEST"):
        caffe.Net("deploy.prototxt")


def test_arrays_are_views_and_stay_the_same(net: caffe.Net):
    data, prob = net.blobs["data"].data, net.blobs["prob"].data
    weights = net.params["fc"][0].data
    data[...] = images(4, 3, 8, 8)
    out = net.forward()
    assert out["prob"] is net.blobs["prob"].data
    assert prob is out["prob"]
    assert prob.sum(1) == pytest.approx(np.ones(4))
    first = prob.copy()
    weights *= 2
    net.forward()
    assert not np.allclose(prob, first)
    assert net.params["fc"][0].data is not None
    assert np.shares_memory(weights, net.params["fc"][0].data)


def test_forward_takes_inputs_and_gives_what_is_asked_for(net: caffe.Net):
    batch = images(4, 3, 8, 8)
    out = net.forward(blobs=["conv"], data=batch)
    assert sorted(out) == ["conv", "prob"]
    assert np.array_equal(net.blobs["data"].data, batch)
    assert list(net.forward(end="pool")) == ["pool"]
    with pytest.raises(ValueError, match="inputs"):
        net.forward(image=batch)
    with pytest.raises(ValueError, match="items"):
        net.forward(data=batch[:2])
    with pytest.raises(ValueError, match="no layer 'pool5'"):
        net.forward(end="pool5")


def test_a_part_of_a_net_can_be_run(net: caffe.Net):
    net.forward(data=images(4, 3, 8, 8))
    net.blobs["fc"].data[...] = 0
    assert net.forward(start="prob")["prob"] == pytest.approx(np.full((4, 6), 1 / 6))
    net.forward(start="fc")
    assert np.abs(net.blobs["fc"].data).max() > 0


def test_backward_goes_from_and_to_where_it_is_told(net: caffe.Net):
    net.forward(data=images(4, 3, 8, 8))
    sent = np.zeros((4, 6), np.float32)
    sent[:, 2] = 1
    back = net.backward(prob=sent)
    assert back["data"] is net.blobs["data"].diff
    whole = back["data"].copy()
    assert np.abs(whole).max() > 0
    prob = net.blobs["prob"].data
    wanted = prob * (sent - (prob * sent).sum(1, keepdims=True))
    assert net.blobs["fc"].diff == pytest.approx(wanted, abs=1e-6)
    assert net.params["fc"][1].diff == pytest.approx(wanted.sum(0), abs=1e-6)
    net.blobs["fc"].diff[...] = wanted
    back = net.backward(start="fc", end="conv", diffs=["pool"])
    assert sorted(back) == ["data", "pool"]
    assert back["data"] == pytest.approx(whole, abs=1e-6)


def test_diffs_of_what_layers_learn_add_up_until_they_are_cleared(net: caffe.Net):
    net.forward(data=images(4, 3, 8, 8))
    net.blobs["prob"].diff[...] = np.arange(6)
    net.backward()
    once = net.params["conv"][0].diff.copy()
    net.backward()
    assert net.params["conv"][0].diff == pytest.approx(2 * once, abs=1e-6)
    net.clear_param_diffs()
    assert not net.params["conv"][0].diff.any()


def test_shapes_follow_those_of_the_inputs(net: caffe.Net):
    net.blobs["data"].reshape(1, 3, 8, 8)
    net.reshape()
    assert net.blobs["conv"].data.shape == (1, 5, 6, 6)
    assert net.blobs["prob"].data.shape == (1, 6)
    assert net.forward(data=images(1, 3, 8, 8))["prob"].shape == (1, 6)
    net.blobs["data"].reshape(1, 3, 20, 20)
    with pytest.raises(ValueError, match="fc"):
        net.forward()


def test_any_number_of_items_is_run_in_batches(net: caffe.Net):
    many = images(10, 3, 8, 8)
    found = net.forward_all(data=many, blobs=["fc"])
    assert found["prob"].shape == (10, 6)
    for start in (0, 4):
        out = net.forward(data=many[start : start + 4])
        assert found["prob"][start : start + 4] == pytest.approx(out["prob"], abs=1e-6)
    outs, backs = net.forward_backward_all(data=many, prob=np.ones((10, 6), np.float32))
    assert outs["prob"].shape == (10, 6)
    assert backs["data"].shape == many.shape


def test_weights_are_copied_and_shared(net: caffe.Net):
    other = caffe.Net("deploy.prototxt", caffe.TEST)
    other.copy_from(net)
    assert np.array_equal(other.params["fc"][0].data, net.params["fc"][0].data)
    other.params["fc"][0].data[...] = 0
    assert net.params["fc"][0].data.any()
    other.share_with(net)
    other.params["fc"][0].data[...] = 3
    assert (net.params["fc"][0].data == 3).all()


def test_memory_data_is_given_arrays(net: caffe.Net):
    Path("memory.prototxt").write_text(
        'layer { name: "in" type: "MemoryData" top: "x" top: "y" '
        "memory_data_param { batch_size: 2 channels: 1 height: 2 width: 2 } } "
        'layer { name: "sum" type: "Reduction" bottom: "x" top: "sum" } '
        'layer { name: "quiet" type: "Silence" bottom: "y" }'
    )
    memory = caffe.Net("memory.prototxt", caffe.TEST)
    memory.set_input_arrays(np.arange(16, dtype=np.float32).reshape(4, 1, 2, 2), np.arange(4.0))
    assert [float(memory.forward()["sum"]) for _ in range(3)] == [28, 92, 28]
    assert memory.blobs["y"].data.ravel().tolist() == [0, 1]
