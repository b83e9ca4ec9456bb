"""pycaffe's ``io``: images to what nets read and back, and messages as arrays."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from soonest import pycaffe as caffe
from soonest.caffe.proto import wire
from soonest.pycaffe.proto import caffe_pb2

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def test_images_are_read_as_red_green_blue_from_0_to_1(tmp_path: Path):
    path = str(tmp_path / "a.png")
    cv2.imwrite(path, IMAGE[..., ::-1])
    assert caffe.io.load_image(path) == pytest.approx(IMAGE / np.float32(255))
    gray = caffe.io.load_image(path, color=False)
    assert gray.shape == (6, 8, 1)
    assert gray[..., 0] * 255 == pytest.approx(cv2.cvtColor(IMAGE, cv2.COLOR_RGB2GRAY), abs=1)
    with pytest.raises(ValueError, match=r"none\.png"):
        caffe.io.load_image("none.png")


def test_images_are_resized():
    image = IMAGE / np.float32(255)
    assert caffe.io.resize_image(image, (6, 8)) == pytest.approx(image)
    twice = caffe.io.resize_image(image, (12, 16), interp_order=0)
    assert np.array_equal(twice, image.repeat(2, 0).repeat(2, 1))
    many = np.zeros((4, 4, 7), np.float32) + np.arange(7)
    assert caffe.io.resize_image(many, (2, 3))[1, 2] == pytest.approx(np.arange(7))
    assert caffe.io.resize_image(image[..., :1], (3, 4)).shape == (3, 4, 1)
    assert np.array_equal(caffe.io.resize(image, (12, 16, 3), order=0, mode="edge"), twice)
    assert np.array_equal(caffe.io.resize(image[..., 1], (12, 16), order=0), twice[..., 1])
    with pytest.raises(ValueError, match="3 channels"):
        caffe.io.resize(image, (3, 3, 1))
    with pytest.raises(ValueError, match="order 2"):
        caffe.io.resize_image(image, (3, 3), interp_order=2)


def test_ten_cuts_are_corners_middle_and_mirrors():
    image = np.arange(6 * 8, dtype=np.float32).reshape(6, 8, 1)
    cuts = caffe.io.oversample([image, image + 1], (2, 4))
    assert cuts.shape == (20, 2, 4, 1)
    starts = [int(cut[0, 0, 0]) for cut in cuts[:5]]
    assert starts == [0, 4, 32, 36, 2 * 8 + 2]
    assert np.array_equal(cuts[5:10], cuts[:5, :, ::-1])
    assert np.array_equal(cuts[10:], cuts[:10] + 1)


def test_what_a_transformer_does_can_be_undone():
    own = caffe.io.Transformer({"data": (1, 3, 6, 8)})
    own.set_transpose("data", (2, 0, 1))
    own.set_channel_swap("data", (2, 0, 1))
    own.set_raw_scale("data", 255)
    own.set_mean("data", np.array([1.0, 2, 3]))
    own.set_input_scale("data", 0.5)
    image = IMAGE / np.float32(255)
    found = own.preprocess("data", image)
    wanted = (IMAGE.transpose(2, 0, 1)[[2, 0, 1]] - np.array([1.0, 2, 3])[:, None, None]) / 2
    assert found == pytest.approx(wanted, abs=1e-4)
    assert own.deprocess("data", found[None]) == pytest.approx(image, abs=1e-5)


def test_settings_that_do_not_fit_are_refused():
    own = caffe.io.Transformer({"data": (1, 3, 6, 8)})
    for set_, value in (
        (own.set_transpose, (0, 1)),
        (own.set_channel_swap, (0, 1)),
        (own.set_mean, np.zeros(2)),
        (own.set_mean, np.zeros((3, 6, 7))),
    ):
        with pytest.raises(ValueError, match=r"axes|channels|shape"):
            set_("data", value)
    with pytest.raises(ValueError, match="'label' is no input"):
        own.set_raw_scale("label", 1)
    own.set_mean("data", np.zeros((3, 6, 8)))


def test_blobs_and_records_are_arrays():
    array = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    blob = caffe.io.array_to_blobproto(array, diff=-array)
    again = caffe_pb2.BlobProto.FromString(blob.SerializeToString())
    assert np.array_equal(caffe.io.blobproto_to_array(again), array)
    assert np.array_equal(caffe.io.blobproto_to_array(again, return_diff=True), -array)
    old = caffe_pb2.BlobProto(num=1, channels=2, height=3, width=4, data=array.ravel())
    assert caffe.io.blobproto_to_array(old).shape == (1, 2, 3, 4)
    listed = caffe.io.arraylist_to_blobprotovector_str([array, array[0]])
    assert [one.shape for one in caffe.io.blobprotovector_str_to_arraylist(listed)] == [
        (2, 3, 4), (3, 4),
    ]  # fmt: skip
    for values in (IMAGE, IMAGE / np.float32(7)):
        datum = caffe.io.array_to_datum(values, label=5)
        assert datum.label == 5
        assert wire.decode(datum.SerializeToString(), "Datum").label == 5
        assert np.array_equal(caffe.io.datum_to_array(datum), values)
