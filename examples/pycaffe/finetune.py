"""Learns two kinds of shapes, then goes on from these weights to learn three.

python -m soonest.pycaffe finetune.py
"""

import cv2
import numpy as np
import shapes

import caffe
from caffe import layers as L  # noqa: N812
from caffe import params as P  # noqa: N812


def net(kinds, data, score):
    n = caffe.NetSpec()
    n.data, n.label = data
    filler = dict(type="xavier")
    n.conv1 = L.Convolution(n.data, kernel_size=5, num_output=12, weight_filler=filler)
    n.relu1 = L.ReLU(n.conv1, in_place=True)
    n.pool1 = L.Pooling(n.relu1, kernel_size=2, stride=2, pool=P.Pooling.MAX)
    n.conv2 = L.Convolution(n.pool1, kernel_size=3, num_output=16, weight_filler=filler)
    n.relu2 = L.ReLU(n.conv2, in_place=True)
    n.pool2 = L.Pooling(n.relu2, kernel_size=2, stride=2, pool=P.Pooling.MAX)
    n[score] = L.InnerProduct(n.pool2, num_output=kinds, weight_filler=filler)
    return n


def train_net(kinds, score, seed):
    settings = dict(batch_size=32, kinds=kinds, seed=seed)
    data = L.Python(module="shapes", layer="ShapesLayer", param_str=repr(settings), ntop=2)
    n = net(kinds, data, score)
    n.loss = L.SoftmaxWithLoss(n[score], n.label)
    n.accuracy = L.Accuracy(n[score], n.label)
    return n


def solver(name, kinds, score):
    for part, seed in (("train", 0), ("test", 1)):
        with open(f"{name}_{part}.prototxt", "w") as file:
            file.write(str(train_net(kinds, score, seed).to_proto()))
    with open(f"{name}_solver.prototxt", "w") as file:
        file.write(
            f'train_net: "{name}_train.prototxt" test_net: "{name}_test.prototxt" test_iter: 5 '
            'test_interval: 100000 test_initialization: false base_lr: 0.003 lr_policy: "fixed" '
            'type: "Adam" momentum: 0.9 display: 50 snapshot_after_train: false'
        )
    return caffe.get_solver(f"{name}_solver.prototxt")


def accuracy(own):
    found = []
    for _ in range(5):
        own.test_nets[0].forward()
        found.append(float(own.test_nets[0].blobs["accuracy"].data))
    return np.mean(found)


caffe.set_mode_cpu()
caffe.set_random_seed(1)

first = solver("two", 2, "score")
first.step(80)
first.net.save("two.caffemodel")
print(f"two kinds: {accuracy(first):.0%}")

second = solver("three", 3, "score3")  # Layers of the same name start from the weights.
second.net.copy_from("two.caffemodel")
print(f"three kinds, before: {accuracy(second):.0%}")
second.step(120)
second.net.save("shapes.caffemodel")
print(f"three kinds, after: {accuracy(second):.0%}")

deploy = net(3, (L.Input(shape=dict(dim=[1, 3, 24, 24])), None), "score3")
del deploy.label
deploy.prob = L.Softmax(deploy.score3)
with open("deploy.prototxt", "w") as file:
    file.write(str(deploy.to_proto()))
cross = shapes.picture("cross", np.random.RandomState(7))
cv2.imwrite("cross.png", (255 * cross[..., ::-1]).astype(np.uint8))
