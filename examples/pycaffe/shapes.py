"""A data layer in Python: pictures of a disc, a square or a cross, each with its number."""

import numpy as np

import caffe

NAMES = ["disc", "square", "cross"]


def picture(kind, random, size=24):
    """A shape somewhere on a dark ground, as (height, width, channels) from 0 to 1."""
    image = random.uniform(0, 0.3, (size, size, 3))
    radius = random.randint(4, 8)
    row, column = random.randint(radius, size - radius, 2)
    rows, columns = np.mgrid[:size, :size] - np.array([row, column])[:, None, None]
    inside = {
        "disc": rows**2 + columns**2 <= radius**2,
        "square": np.maximum(abs(rows), abs(columns)) <= radius * 0.8,
        "cross": (np.minimum(abs(rows), abs(columns)) <= 1)
        & (np.maximum(abs(rows), abs(columns)) <= radius),
    }[kind]
    image[inside] = random.uniform(0.6, 1, 3)
    return image


class ShapesLayer(caffe.Layer):
    """Gives pictures and labels; param_str says how many, and of how many kinds."""

    def setup(self, bottom, top):
        settings = eval(self.param_str)
        self.batch_size, self.kinds = settings["batch_size"], settings["kinds"]
        self.random = np.random.RandomState(settings["seed"])

    def reshape(self, bottom, top):
        top[0].reshape(self.batch_size, 3, 24, 24)
        top[1].reshape(self.batch_size)

    def forward(self, bottom, top):
        for number in range(self.batch_size):
            label = self.random.randint(self.kinds)
            image = picture(NAMES[label], self.random)
            # As the net that is deployed will get them: blue first, around 0.
            top[0].data[number] = (255 * image.transpose(2, 0, 1)[::-1] - 64) / 128
            top[1].data[number] = label

    def backward(self, top, propagate_down, bottom):
        pass
