"""Makes a data base for Caffe's Data layer from labelled images.

    python make_lmdb.py mnist_train.csv mnist_train_lmdb
    python make_lmdb.py train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz train_lmdb
    python make_lmdb.py --margin 2 train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz train_lmdb

A line of CSV is a label and the pixels of a square grey image; the others are the files of MNIST
and Fashion-MNIST as they are published. A margin of 2 makes 32 x 32 pixels of 28 x 28.
"""

from __future__ import annotations

import argparse
import gzip
import math
from pathlib import Path

import lmdb
import numpy as np

from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message


def read_csv(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (number, height, width) and labels."""
    with open(path, encoding="ascii") as file:
        header = not file.readline().split(",")[0].strip().isdigit()
    table = np.loadtxt(path, dtype=np.uint8, delimiter=",", skiprows=int(header))
    side = math.isqrt(table.shape[1] - 1)
    return table[:, 1:].reshape(-1, side, side), table[:, 0]


def read_idx(path: str) -> np.ndarray:
    """An array in the format of MNIST's own files."""
    data = Path(path).read_bytes()
    data = gzip.decompress(data) if path.endswith(".gz") else data
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def write(images: np.ndarray, labels: np.ndarray, folder: str) -> None:
    """Writes one record an image, in a random order that is always the same."""
    order = np.random.default_rng(0).permutation(len(images))
    map_bytes = 4 * images.nbytes + 2**26
    with lmdb.open(folder, map_size=map_bytes) as base, base.begin(write=True) as transaction:
        for number, place in enumerate(order):
            height, width = images[place].shape
            datum = Message("Datum", channels=1, height=height, width=width)
            datum.data, datum.label = images[place].tobytes(), int(labels[place])
            transaction.put(f"{number:08d}".encode(), wire.encode(datum))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", help="a CSV file, or images and their labels")
    parser.add_argument("folder", help="of the data base, which is made")
    parser.add_argument("--margin", type=int, default=0, help="black pixels on each side")
    args = parser.parse_args()
    if len(args.sources) > 2:
        parser.error("give one CSV file, or one file of images and one of labels")
    images, labels = (
        read_csv(args.sources[0]) if len(args.sources) == 1 else map(read_idx, args.sources)
    )
    margins = ((0, 0), (args.margin, args.margin), (args.margin, args.margin))
    write(np.pad(images, margins), labels, args.folder)
