"""What the notebooks and scripts that people have of Caffe do, on small nets of our own."""

# ruff: noqa: C408 - Scripts say dict(...) where layers are written.

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from soonest import pycaffe as caffe
from soonest.pycaffe import layers as L  # noqa: N812 - As all scripts say.
from soonest.pycaffe import params as P  # noqa: N812


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    caffe.set_random_seed(1)
    return tmp_path


def solver(net: str, more: str = "", test: str = "", base_lr: float = 0.1) -> str:
    Path("solver.prototxt").write_text(
        f'train_net: "{net}" {test} base_lr: {base_lr} momentum: 0.9 lr_policy: "fixed" display: 0 '
        f"max_iter: 100 snapshot_after_train: false {more}"
    )
    return "solver.prototxt"


def deploy() -> str:
    net = caffe.NetSpec()
    net.data = L.Input(shape=dict(dim=[10, 3, 12, 12]))
    net.conv1 = L.Convolution(
        net.data, kernel_size=3, num_output=4, weight_filler=dict(type="xavier")
    )
    net.relu1 = L.ReLU(net.conv1, in_place=True)
    net.pool1 = L.Pooling(net.relu1, kernel_size=2, stride=2, pool=P.Pooling.MAX)
    net.fc = L.InnerProduct(net.pool1, num_output=5, weight_filler=dict(type="xavier"))
    net.prob = L.Softmax(net.fc)
    Path("deploy.prototxt").write_text(str(net.to_proto()))
    return "deploy.prototxt"


def test_an_image_is_classified():
    caffe.set_mode_cpu()
    made = caffe.Net(deploy(), caffe.TEST)
    made.save("w.caffemodel")
    cv2.imwrite("cat.png", np.random.default_rng(0).integers(0, 255, (20, 16, 3), np.uint8))
    mean = np.array([104.0, 117.0, 123.0])
    net = caffe.Net("deploy.prototxt", "w.caffemodel", caffe.TEST)
    transformer = caffe.io.Transformer({"data": net.blobs["data"].data.shape})
    transformer.set_transpose("data", (2, 0, 1))
    transformer.set_mean("data", mean)
    transformer.set_raw_scale("data", 255)
    transformer.set_channel_swap("data", (2, 1, 0))
    net.blobs["data"].reshape(1, 3, 12, 12)
    image = caffe.io.load_image("cat.png")
    assert image.shape == (20, 16, 3)
    net.blobs["data"].data[...] = transformer.preprocess("data", image)
    output = net.forward()["prob"][0]
    # By hand: OpenCV has blue first and values to 255, as the net wants them.
    pixels = cv2.resize(cv2.imread("cat.png").astype(np.float32), (12, 12)) - mean
    assert net.blobs["data"].data[0] == pytest.approx(pixels.transpose(2, 0, 1), abs=1e-3)
    assert output.shape == (5,)

    classifier = caffe.Classifier(
        "deploy.prototxt", "w.caffemodel", mean=mean, channel_swap=(2, 1, 0), raw_scale=255,
        image_dims=(14, 14),
    )  # fmt: skip
    middle = classifier.predict([image, image], oversample=False)
    assert middle.shape == (2, 5)
    assert middle.sum(1) == pytest.approx([1, 1])
    ten = classifier.predict([image])
    cut = caffe.io.oversample([caffe.io.resize_image(image, (14, 14))], (12, 12))
    each = [classifier.transformer.preprocess("data", one) for one in cut]
    assert ten[0] == pytest.approx(net_mean(net, each), abs=1e-5)


def net_mean(net: caffe.Net, images: list[np.ndarray]) -> np.ndarray:
    net.blobs["data"].reshape(len(images), 3, 12, 12)
    return net.forward(data=np.array(images))["prob"].mean(0)


def test_windows_are_detected():
    caffe.Net(deploy(), caffe.TEST).save("w.caffemodel")
    cv2.imwrite("a.png", np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8))
    for pad in (0, 2):
        detector = caffe.Detector(
            "deploy.prototxt", "w.caffemodel", mean=np.array([0.1, 0.2, 0.3]), raw_scale=1,
            channel_swap=(2, 1, 0), context_pad=pad,
        )  # fmt: skip
        found = detector.detect_windows([("a.png", [(0, 0, 12, 12), (5, 6, 25, 29)])])
        assert [one["filename"] for one in found] == ["a.png", "a.png"]
        assert found[1]["window"].tolist() == [5, 6, 25, 29]
        assert found[0]["prediction"].sum() == pytest.approx(1)
        assert not np.allclose(found[0]["prediction"], found[1]["prediction"])


def test_surgery_makes_a_classifier_run_on_a_map():
    net = caffe.Net(deploy(), caffe.TEST)
    spec = caffe.NetSpec()
    spec.data = L.Input(shape=dict(dim=[1, 3, 18, 18]))
    spec.conv1 = L.Convolution(spec.data, kernel_size=3, num_output=4)
    spec.relu1 = L.ReLU(spec.conv1, in_place=True)
    spec.pool1 = L.Pooling(spec.relu1, kernel_size=2, stride=2, pool=P.Pooling.MAX)
    spec["fc-conv"] = L.Convolution(spec.pool1, kernel_size=5, num_output=5)
    spec.prob = L.Softmax(spec["fc-conv"])
    Path("full.prototxt").write_text(str(spec.to_proto()))
    net.save("w.caffemodel")
    full = caffe.Net("full.prototxt", "w.caffemodel", caffe.TEST)
    full.params["fc-conv"][0].data.flat = net.params["fc"][0].data.flat
    full.params["fc-conv"][1].data[...] = net.params["fc"][1].data
    full.save("full.caffemodel")
    image = np.random.default_rng(0).normal(size=(1, 3, 18, 18)).astype(np.float32)
    heat = full.forward(data=image)["prob"]
    assert heat.shape == (1, 5, 4, 4)
    net.blobs["data"].reshape(1, 3, 12, 12)
    for row, column in ((0, 0), (2, 3)):
        cut = image[:, :, 2 * row : 2 * row + 12, 2 * column : 2 * column + 12]
        assert heat[0, :, row, column] == pytest.approx(net.forward(data=cut)["prob"][0], abs=1e-5)


def logistic(source: str, batch: int) -> str:
    net = caffe.NetSpec()
    net.data, net.label = L.HDF5Data(batch_size=batch, source=source, ntop=2)
    net.ip1 = L.InnerProduct(net.data, num_output=2, weight_filler=dict(type="xavier"))
    net.accuracy = L.Accuracy(net.ip1, net.label)
    net.loss = L.SoftmaxWithLoss(net.ip1, net.label)
    return str(net.to_proto())


def test_logistic_regression_is_brewed():
    random = np.random.default_rng(0)
    data = random.normal(size=(400, 4)).astype(np.float32)
    label = (data @ np.array([1.0, -2, 0.5, 0]) > 0).astype(np.float32)
    for name, part in (("train", slice(300)), ("test", slice(300, 400))):
        with h5py.File(f"{name}.h5", "w") as file:
            file["data"], file["label"] = data[part], label[part]
        Path(f"{name}.txt").write_text(f"{name}.h5\n")
        Path(f"{name}.prototxt").write_text(logistic(f"{name}.txt", 10))
    own = caffe.get_solver(
        solver("train.prototxt", test='test_net: "test.prototxt" test_iter: 10 test_interval: 50')
    )
    assert type(own) is caffe.SGDSolver
    own.solve()
    accuracy = 0.0
    for _ in range(10):
        own.test_nets[0].forward()
        accuracy += float(own.test_nets[0].blobs["accuracy"].data) / 10
    assert accuracy > 0.9


def test_a_net_is_fine_tuned_step_by_step():
    def net(classes: str, outputs: int) -> str:
        spec = caffe.NetSpec()
        spec.data = L.DummyData(shape=dict(dim=[8, 3]), data_filler=dict(type="gaussian"))
        spec.label = L.DummyData(shape=dict(dim=[8]), data_filler=dict(type="constant", value=1))
        spec.hidden = L.InnerProduct(
            spec.data, num_output=6, weight_filler=dict(type="xavier"),
            param=[dict(lr_mult=0, decay_mult=0), dict(lr_mult=0)],
        )  # fmt: skip
        spec[classes] = L.InnerProduct(
            spec.hidden, num_output=outputs, weight_filler=dict(type="xavier"),
            param=[dict(lr_mult=1), dict(lr_mult=2)],
        )  # fmt: skip
        spec.loss = L.SoftmaxWithLoss(spec[classes], spec.label)
        Path(f"{classes}.prototxt").write_text(str(spec.to_proto()))
        return f"{classes}.prototxt"

    caffe.Net(net("old", 4), caffe.TRAIN).save("pretrained.caffemodel")
    own = caffe.SGDSolver(solver(net("new", 3)))
    fresh = own.net.params["new"][0].data.copy()
    own.net.copy_from("pretrained.caffemodel")
    pretrained = caffe.Net("old.prototxt", "pretrained.caffemodel", caffe.TRAIN)
    assert np.array_equal(own.net.params["hidden"][0].data, pretrained.params["hidden"][0].data)
    losses = []
    for number in range(20):
        own.step(1)
        losses.append(float(own.net.blobs["loss"].data))
        assert own.iter == number + 1
    assert losses[-1] < 0.5 * losses[0]
    assert np.array_equal(own.net.params["hidden"][0].data, pretrained.params["hidden"][0].data)
    assert not np.array_equal(own.net.params["new"][0].data, fresh)
    assert own.net.blobs["new"].data.shape == (8, 3)
    probability = np.exp(own.net.blobs["new"].data)
    probability /= probability.sum(1, keepdims=True)
    assert own.net.blobs["new"].diff == pytest.approx((probability - [0, 1, 0]) / 8, abs=1e-6)


MULTILABEL = """
import json
import numpy as np
import caffe

class MultilabelData(caffe.Layer):
    def setup(self, bottom, top):
        params = eval(self.param_str)
        self.batch_size = params['batch_size']
        self.random = np.random.RandomState(0)
        top[0].reshape(self.batch_size, 3, 4, 4)
        top[1].reshape(self.batch_size, 3)

    def reshape(self, bottom, top):
        pass

    def forward(self, bottom, top):
        for number in range(self.batch_size):
            labels = self.random.randint(0, 2, 3)
            top[0].data[number, ...] = labels[:, None, None] + 0.1 * self.random.randn(3, 4, 4)
            top[1].data[number, ...] = labels

    def backward(self, top, propagate_down, bottom):
        pass
"""


def test_several_labels_come_from_a_data_layer_in_python(monkeypatch: pytest.MonkeyPatch):
    Path("multilabel.py").write_text(MULTILABEL)
    monkeypatch.delitem(sys.modules, "multilabel", raising=False)
    spec = caffe.NetSpec()
    spec.data, spec.label = L.Python(
        module="multilabel", layer="MultilabelData", ntop=2, param_str=str(dict(batch_size=16))
    )
    spec.score = L.InnerProduct(spec.data, num_output=3, weight_filler=dict(type="xavier"))
    spec.loss = L.SigmoidCrossEntropyLoss(spec.score, spec.label)
    Path("net.prototxt").write_text(str(spec.to_proto()))
    test = 'test_net: "net.prototxt" test_iter: 1 test_interval: 1000'
    own = caffe.SGDSolver(solver("net.prototxt", "test_initialization: false", test))
    own.step(60)
    own.test_nets[0].share_with(own.net)
    right = 0.0
    for _ in range(5):
        own.test_nets[0].forward()
        truth = own.test_nets[0].blobs["label"].data
        guess = own.test_nets[0].blobs["score"].data > 0
        right += float((truth == guess).mean()) / 5
    assert right > 0.95


SEGMENTS = """
import numpy as np
import caffe

class SegDataLayer(caffe.Layer):
    '''One image a pass, each of a size of its own.'''

    def setup(self, bottom, top):
        params = eval(self.param_str)
        self.sizes, self.idx = params['sizes'], 0
        self.random = np.random.RandomState(params['seed'])
        if len(bottom) != 0:
            raise Exception("Do not define a bottom.")

    def reshape(self, bottom, top):
        height, width = self.sizes[self.idx]
        edge = self.random.randint(1, width)
        self.label = np.zeros((1, height, width)) + (np.arange(width) < edge)
        self.data = 2 * self.label - 1 + 0.5 * self.random.randn(3, height, width)
        top[0].reshape(1, *self.data.shape)
        top[1].reshape(1, *self.label.shape)

    def forward(self, bottom, top):
        top[0].data[...] = self.data
        top[1].data[...] = self.label
        self.idx = (self.idx + 1) % len(self.sizes)

    def backward(self, top, propagate_down, bottom):
        pass
"""


def fcn(sizes: list[tuple[int, int]], seed: int) -> str:
    net = caffe.NetSpec()
    net.data, net.label = L.Python(
        module="segments", layer="SegDataLayer", ntop=2, param_str=str(dict(sizes=sizes, seed=seed))
    )
    net.conv1 = L.Convolution(
        net.data, kernel_size=3, num_output=8, pad=1, weight_filler=dict(type="xavier")
    )
    net.relu1 = L.ReLU(net.conv1, in_place=True)
    net.score = L.Convolution(
        net.relu1, kernel_size=1, num_output=2, weight_filler=dict(type="xavier")
    )
    net.upscore = L.Deconvolution(
        net.score,
        convolution_param=dict(num_output=2, kernel_size=3, stride=1, group=2, bias_term=False),
        param=[dict(lr_mult=0)],
    )
    net.cropped = L.Crop(net.upscore, net.data, axis=2, offset=1)
    net.loss = L.SoftmaxWithLoss(net.cropped, net.label, loss_param=dict(normalize=False))
    return str(net.to_proto())


def interp(net: caffe.Net, names: list[str]) -> None:
    """Bilinear weights for layers that scale up, as the scripts of FCN set them."""
    for name in names:
        _, _, height, width = net.params[name][0].data.shape
        factor = (height + 1) // 2
        centre = factor - 1 if height % 2 == 1 else factor - 0.5
        rows, columns = np.ogrid[:height, :width]
        net.params[name][0].data[:, 0] = (1 - abs(rows - centre) / factor) * (
            1 - abs(columns - centre) / factor
        )


def test_a_fully_convolutional_net_learns_from_images_of_several_sizes(
    monkeypatch: pytest.MonkeyPatch,
):
    Path("segments.py").write_text(SEGMENTS)
    monkeypatch.delitem(sys.modules, "segments", raising=False)
    Path("train.prototxt").write_text(fcn([(6, 9), (12, 7), (10, 10)], 0))
    Path("val.prototxt").write_text(fcn([(8, 11), (9, 5)], 1))
    test = 'test_net: "val.prototxt" test_iter: 2 test_interval: 100000'
    own = caffe.SGDSolver(
        solver("train.prototxt", "test_initialization: false", test, base_lr=0.001)
    )
    interp(own.net, [name for name in own.net.params if "up" in name])
    assert own.net.params["upscore"][0].data[0, 0, 1, 1] == 1
    shapes = set()
    for _ in range(60):
        own.step(1)
        shapes.add(own.net.blobs["cropped"].data.shape)
    assert shapes == {(1, 2, 6, 9), (1, 2, 12, 7), (1, 2, 10, 10)}
    net = own.test_nets[0]
    net.share_with(own.net)
    hist = np.zeros((2, 2))
    for _ in range(4):
        net.forward()
        truth = net.blobs["label"].data[0, 0].ravel().astype(int)
        guess = net.blobs["cropped"].data[0].argmax(0).ravel()
        hist += np.bincount(2 * truth + guess, minlength=4).reshape(2, 2)
    assert np.diag(hist).sum() / hist.sum() > 0.9


LOSS = """
import numpy as np
import caffe

class EuclideanLossLayer(caffe.Layer):
    def setup(self, bottom, top):
        if len(bottom) != 2:
            raise Exception("Need two inputs to compute distance.")

    def reshape(self, bottom, top):
        if bottom[0].count != bottom[1].count:
            raise Exception("Inputs must have the same dimension.")
        self.diff = np.zeros_like(bottom[0].data, dtype=np.float32)
        top[0].reshape(1)

    def forward(self, bottom, top):
        self.diff[...] = bottom[0].data - bottom[1].data
        top[0].data[...] = np.sum(self.diff**2) / bottom[0].num / 2.

    def backward(self, top, propagate_down, bottom):
        for i in range(2):
            if not propagate_down[i]:
                continue
            sign = 1 if i == 0 else -1
            bottom[i].diff[...] = sign * self.diff / bottom[i].num
"""


def test_a_loss_in_python_is_that_of_caffe(monkeypatch: pytest.MonkeyPatch):
    Path("pyloss.py").write_text(LOSS)
    monkeypatch.delitem(sys.modules, "pyloss", raising=False)
    found = []
    for type_ in ('"EuclideanLoss"', '"Python" python_param { module: "pyloss" layer: '
                  '"EuclideanLossLayer" } loss_weight: 1'):  # fmt: skip
        Path("net.prototxt").write_text(
            'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 4 dim: 3 } } }'
            'layer { name: "y" type: "Input" top: "y" input_param { shape { dim: 4 dim: 2 } } }'
            'layer { name: "ip" type: "InnerProduct" bottom: "x" top: "ip" '
            'inner_product_param { num_output: 2 weight_filler { type: "constant" value: 0.3 } } }'
            f'layer {{ name: "loss" bottom: "ip" bottom: "y" top: "loss" type: {type_} }}'
        )
        net = caffe.Net("net.prototxt", caffe.TRAIN)
        random = np.random.default_rng(0)
        loss = net.forward(x=random.normal(size=(4, 3)), y=random.normal(size=(4, 2)))["loss"]
        net.backward()
        found.append((float(np.ravel(loss)[0]), net.params["ip"][0].diff, net.blobs["x"].diff))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
        assert np.abs(ours).max() > 0


SCRIPT = """
import sys
import caffe
import caffe.io
from caffe import layers as L, params as P
from caffe.proto import caffe_pb2
from google.protobuf import text_format

assert __name__ == '__main__'
assert caffe.io.Transformer is sys.modules['caffe.io'].Transformer is caffe.io.Transformer
net = caffe_pb2.NetParameter()
text_format.Merge(open(sys.argv[1]).read(), net)
assert caffe_pb2.TEST == caffe.TEST == 1
print(net.name, [layer.name for layer in net.layer], len(caffe.layer_type_list()) > 50)
"""


def test_a_script_that_imports_caffe_runs():
    Path("script.py").write_text(SCRIPT)
    Path("n.prototxt").write_text('name: "n" layer { name: "a" type: "ReLU" }')
    done = subprocess.run(
        [sys.executable, "-m", "soonest.pycaffe", "script.py", "n.prototxt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "n ['a'] True\n"
