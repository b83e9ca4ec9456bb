"""Nets written in Python: the definition is what one would write by hand."""

# ruff: noqa: C408 - Scripts say dict(...) where layers are written.

from __future__ import annotations

from pathlib import Path

import pytest

from soonest import pycaffe as caffe
from soonest.caffe.proto.text import parse
from soonest.pycaffe import layers as L  # noqa: N812 - As all scripts say.
from soonest.pycaffe import params as P  # noqa: N812

LENET = """
layer { name: "data" type: "Data" top: "data" top: "label"
  transform_param { scale: 0.00390625 } data_param { source: "lmdb" batch_size: 64 backend: LMDB } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 20 kernel_size: 5 weight_filler { type: "xavier" } } }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
  pooling_param { pool: MAX kernel_size: 2 stride: 2 } }
layer { name: "ip1" type: "InnerProduct" bottom: "pool1" top: "ip1"
  param { lr_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
  inner_product_param { num_output: 50 weight_filler { type: "xavier" } } }
layer { name: "relu1" type: "ReLU" bottom: "ip1" top: "ip1" }
layer { name: "score" type: "InnerProduct" bottom: "ip1" top: "score"
  inner_product_param { num_output: 10 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "score" bottom: "label" top: "loss" }
"""


def test_a_net_is_written_as_by_hand():
    n = caffe.NetSpec()
    n.data, n.label = L.Data(
        batch_size=64, backend=P.Data.LMDB, source="lmdb", transform_param=dict(scale=1 / 256),
        ntop=2,
    )  # fmt: skip
    filler = dict(type="xavier")
    n.conv1 = L.Convolution(n.data, kernel_size=5, num_output=20, weight_filler=filler)
    n.pool1 = L.Pooling(n.conv1, kernel_size=2, stride=2, pool=P.Pooling.MAX)
    n.ip1 = L.InnerProduct(
        n.pool1, num_output=50, weight_filler=filler,
        param=[dict(lr_mult=1), dict(lr_mult=2, decay_mult=0)],
    )  # fmt: skip
    n.relu1 = L.ReLU(n.ip1, in_place=True)
    n.score = L.InnerProduct(n.relu1, num_output=10)
    n.loss = L.SoftmaxWithLoss(n.score, n.label)
    assert parse(str(n.to_proto()), "NetParameter") == parse(LENET, "NetParameter")
    assert n.keys() == ["data", "label", "conv1", "pool1", "ip1", "relu1", "score", "loss"]


def test_names_are_made_up_where_none_is_given():
    data, label = L.DummyData(shape=[dict(dim=[2, 3]), dict(dim=[2])], ntop=2)
    hidden = L.ReLU(L.InnerProduct(data, num_output=4), in_place=True)
    loss = L.SoftmaxWithLoss(L.InnerProduct(hidden, num_output=3, name="last"), label)
    net = caffe.to_proto(loss)
    assert [(one.name, list(one.bottom), list(one.top)) for one in net.layer] == [
        ("DummyData1", [], ["DummyData11", "DummyData12"]),
        ("InnerProduct1", ["DummyData11"], ["InnerProduct1"]),
        ("ReLU1", ["InnerProduct1"], ["InnerProduct1"]),
        ("last", ["InnerProduct1"], ["last"]),
        ("SoftmaxWithLoss1", ["last", "DummyData12"], ["SoftmaxWithLoss1"]),
    ]


def test_rules_layers_without_tops_and_other_names_are_written(tmp_path: Path):
    n = caffe.NetSpec()
    n.data = L.Input(shape=[dict(dim=[1, 2])], include=dict(phase=caffe.TEST))
    n["a/b"] = L.Power(n.data, scale=2.0, name="doubled")
    n.silence = L.Silence(n["a/b"], ntop=0)
    n.extra = L.Reduction(n.data, operation="SUMSQ")
    del n.extra
    assert parse(str(n.to_proto()), "NetParameter") == parse(
        'layer { name: "data" type: "Input" top: "data" include { phase: TEST } '
        "input_param { shape { dim: 1 dim: 2 } } } "
        'layer { name: "doubled" type: "Power" bottom: "data" top: "a/b" '
        "power_param { scale: 2 } } "
        'layer { name: "silence" type: "Silence" bottom: "a/b" }',
        "NetParameter",
    )
    (tmp_path / "n.prototxt").write_text(str(n.to_proto()))
    assert list(caffe.Net(str(tmp_path / "n.prototxt"), caffe.TEST).blobs) == ["data", "a/b"]


def test_what_a_layer_cannot_have_is_refused():
    n = caffe.NetSpec()
    n.data = L.Input(shape=dict(dim=[1]))
    for wrong in (
        lambda: caffe.to_proto(L.Pooling(n.data, ceil_mode=True)),
        lambda: caffe.to_proto(L.Pooling(n.data, pool="MEDIAN")),
        lambda: caffe.to_proto(L.Softmaxx(n.data, axis=1)),
        lambda: P.Pooling.MEDIAN,
        lambda: L.Pooling("data"),
        lambda: n.missing,
    ):
        with pytest.raises((ValueError, AttributeError, TypeError), match=r"has no|reads 'data'"):
            wrong()


def test_a_net_is_drawn(tmp_path: Path):
    net = caffe.to_proto(L.Pooling(L.Input(shape=dict(dim=[1, 1, 4, 4])), kernel_size=2))
    caffe.draw.draw_net_to_file(net, str(tmp_path / "net.svg"), "TB")
    assert "MAX of 2" in (tmp_path / "net.svg").read_text()
