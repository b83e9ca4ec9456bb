"""What is done to images, by numbers that are worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from soonest.caffe.data.transform import Transform
from soonest.caffe.io.blobs import to_blob
from soonest.caffe.io.weights import write_message
from soonest.caffe.proto.text import parse

PLACES = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
"""An image of one channel whose values tell where they were."""


def transformed(spec: str, image: np.ndarray = PLACES, phase: str = "TEST") -> np.ndarray:
    made = Transform(parse(spec, "TransformationParameter"), phase, np.random.default_rng(1))
    return made.batch([image])[0]


def test_a_test_is_made_in_the_middle():
    assert transformed("crop_size: 2").tolist() == [[[5, 6], [9, 10]]]


def test_training_is_made_anywhere():
    spec = parse("crop_size: 3", "TransformationParameter")
    made = Transform(spec, "TRAIN", np.random.default_rng(1))
    corners = {int(made.batch([PLACES])[0, 0, 0, 0]) for _ in range(100)}
    assert corners == {0, 1, 4, 5}


def test_the_mean_is_taken_off_before_the_scale():
    # (5 - 4)·0.5, (6 - 4)·0.5, …
    found = transformed("crop_size: 2 mean_value: 4 scale: 0.5")
    assert found.tolist() == [[[0.5, 1.0], [2.5, 3.0]]]


def test_a_mean_image_is_cut_where_the_image_is(tmp_path: Path):
    write_message(tmp_path / "mean", to_blob(PLACES.astype(np.float32)))
    assert not transformed(f'crop_size: 2 mean_file: "{tmp_path}/mean"').any()


def test_each_channel_has_a_mean_of_its_own():
    image = np.stack([PLACES[0], PLACES[0] + 10])
    found = transformed("crop_size: 2 mean_value: 5 mean_value: 15", image)
    assert found.tolist() == [[[0, 1], [4, 5]]] * 2


def test_mirrored_images_go_from_right_to_left():
    spec = parse("mirror: true", "TransformationParameter")
    made = Transform(spec, "TEST", np.random.default_rng(1))
    seen = {tuple(made.batch([PLACES])[0, 0, 0].tolist()) for _ in range(50)}
    assert seen == {(0, 1, 2, 3), (3, 2, 1, 0)}


def test_a_crop_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="crop_size 5 is larger than an image of 4 x 4"):
        transformed("crop_size: 5")
