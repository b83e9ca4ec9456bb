"""Says what is on an image, with the net that finetune.py has trained.

python -m soonest.pycaffe classify.py cross.png
"""

import sys

import numpy as np

import caffe

NAMES = ["disc", "square", "cross"]

net = caffe.Net("deploy.prototxt", "shapes.caffemodel", caffe.TEST)
transformer = caffe.io.Transformer({"data": net.blobs["data"].data.shape})
transformer.set_transpose("data", (2, 0, 1))  # Channels first,
transformer.set_channel_swap("data", (2, 1, 0))  # blue first,
transformer.set_raw_scale("data", 255)  # up to 255,
transformer.set_mean("data", np.array([64, 64, 64]))  # around 0,
transformer.set_input_scale("data", 1 / 128)  # and small.

image = caffe.io.load_image(sys.argv[1])
net.blobs["data"].data[...] = transformer.preprocess("data", image)
prob = net.forward()["prob"][0]
for kind in prob.argsort()[::-1]:
    print(f"{prob[kind]:.3f} {NAMES[kind]}")
