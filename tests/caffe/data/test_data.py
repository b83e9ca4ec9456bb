"""Layers that read records, and what is done to images."""

from __future__ import annotations

import gzip
import itertools
import os
import runpy
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import h5py
import lmdb
import numpy as np
import pytest

from helpers import golden_caffe as golden
from soonest.caffe.data.ahead import Ahead
from soonest.caffe.data.records import RecordLayer
from soonest.caffe.data.stores import opened
from soonest.caffe.data.transform import Transform
from soonest.caffe.io.blobs import to_blob
from soonest.caffe.io.weights import write_message
from soonest.caffe.net.net import Net
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message
from soonest.caffe.proto.text import parse
from soonest.cli import main

RANDOM = np.random.default_rng(5)
IMAGES = RANDOM.integers(0, 256, (7, 3, 6, 5), dtype=np.uint8)


def transform(spec: str, phase: str = "TEST", images: Any = IMAGES) -> np.ndarray:
    made = Transform(parse(spec, "TransformationParameter"), phase, np.random.default_rng(1))
    return made.batch(list(images))


def test_mean_values_and_scale():
    expected = (IMAGES.astype(np.float32) - np.float32([1, 2, 3]).reshape(3, 1, 1)) * 0.5
    found = transform("scale: 0.5 mean_value: [1, 2, 3]")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.array_equal(transform("mean_value: 4"), IMAGES.astype(np.float32) - 4)


def test_a_mean_image_is_cropped_and_mirrored_with_the_image(tmp_path: Path):
    mean = RANDOM.random((1, 3, 6, 5), dtype=np.float32)
    write_message(tmp_path / "mean.binaryproto", to_blob(mean))
    spec = f'mean_file: "{tmp_path}/mean.binaryproto" crop_size: 4'
    whole = IMAGES - mean[0]
    assert np.array_equal(transform(spec), whole[:, :, 1:5, 0:4])
    places = {
        (mirrored, top, left): whole[:, :, top : top + 4, left : left + 4][..., :: 1 - 2 * mirrored]
        for mirrored in (0, 1)
        for top in range(3)
        for left in range(2)
    }
    many = np.repeat(IMAGES[:1], 200, axis=0)
    seen = set()
    for image in transform(spec + " mirror: true", "TRAIN", many):
        found = [key for key, value in places.items() if np.array_equal(value[0], image)]
        assert len(found) == 1
        seen.update(found)
    assert seen == set(places)


WRONG = {
    "crop_size: 7": "crop_size 7 is larger",
    "mean_value: [1, 2]": "2 mean_value for 3 channels",
    'mean_value: 1 mean_file: "x"': "both mean_file and mean_value",
    'mean_file: "none.binaryproto"': "cannot read none.binaryproto",
}


@pytest.mark.parametrize("spec", WRONG)
def test_what_cannot_be_done_to_images_is_refused(spec: str):
    with pytest.raises(ValueError, match=WRONG[spec]):
        transform(spec)


def test_images_of_several_sizes_need_a_crop():
    images = [IMAGES[0], IMAGES[1][:, :5]]
    with pytest.raises(ValueError, match="without crop_size"):
        transform("", images=images)
    assert transform("crop_size: 4", images=images).shape == (2, 3, 4, 4)


def net(source: str, phase: str = "TRAIN", **options: Any) -> Net:
    return Net(parse(source, "NetParameter"), phase, **options)


def lmdb_of(path: Path, values: list[bytes]) -> None:
    with lmdb.open(str(path), map_size=2**24) as base, base.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(f"{number:08d}".encode(), value)


def data_layer(source: Path, batch: int, more: str = "", transformed: str = "") -> str:
    return (
        f'layer {{ name: "d" type: "Data" top: "x" top: "y" transform_param {{ {transformed} }} '
        f'data_param {{ source: "{source}" backend: LMDB batch_size: {batch} {more} }} }}'
    )


def data(image: np.ndarray, label: int, **values: Any) -> bytes:
    channels, height, width = image.shape
    return wire.encode(
        Message("Datum", channels=channels, height=height, width=width, label=label, **values)
    )


def labels(made: Net, batches: int) -> list[list[int]]:
    return [made().outputs["y"].int().tolist() for _ in range(batches)]


def test_records_are_read_in_turn_and_shared_out_among_ranks(tmp_path: Path):
    lmdb_of(tmp_path / "db", [data(x, n, data=x.tobytes()) for n, x in enumerate(IMAGES)])
    source = data_layer(tmp_path / "db", 3)
    made = net(source)
    result = made()
    assert np.array_equal(result.outputs["x"].numpy(), IMAGES[:3])
    assert result.outputs["y"].tolist() == [0, 1, 2]
    assert labels(made, 2) == [[3, 4, 5], [6, 0, 1]]
    assert labels(net(source, rank=1, ranks=2), 3) == [[1, 3, 5], [0, 2, 4], [6, 1, 3]]
    assert labels(net(source, "TEST", rank=1, ranks=2), 1) == [[0, 1, 2]]
    assert labels(net(source, rank=1, ranks=3, divide=True), 3) == [[1], [4], [0]]
    with pytest.raises(ValueError, match="cannot be divided by 2 ranks"):
        net(source, rank=1, ranks=2, divide=True)


def test_records_of_numbers_and_of_compressed_images(tmp_path: Path):
    numbers = RANDOM.random((2, 3, 4), dtype=np.float32)
    lmdb_of(tmp_path / "numbers", [data(numbers, 1, float_data=numbers)])
    assert np.array_equal(net(data_layer(tmp_path / "numbers", 1))().outputs["x"][0], numbers)
    png = cv2.imencode(".png", IMAGES[0].transpose(1, 2, 0))[1].tobytes()
    lmdb_of(tmp_path / "png", [wire.encode(Message("Datum", data=png, encoded=True, label=3))])
    made = net(data_layer(tmp_path / "png", 2))
    assert np.array_equal(made().outputs["x"][1], IMAGES[0])
    assert made.shapes == {"x": (2, 3, 6, 5), "y": (2,)}


MAKE_LMDB = Path(__file__).parents[3] / "examples" / "caffe" / "make_lmdb.py"


@pytest.mark.parametrize("margin", [0, 2])
def test_the_example_makes_data_bases_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, margin: int
):
    images, numbers = IMAGES[:, 0, :5], np.arange(len(IMAGES), dtype=np.uint8)
    for name, array in (("images", images), ("labels", numbers)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))
    rows = [f"{n},{','.join(map(str, x.flatten()))}" for n, x in zip(numbers, images, strict=True)]
    (tmp_path / "rows.csv").write_text("\n".join(["label,pixels", *rows]))
    monkeypatch.chdir(tmp_path)
    for target, sources in {"one": ["images.gz", "labels.gz"], "two": ["rows.csv"]}.items():
        monkeypatch.setattr(sys, "argv", ["", "--margin", str(margin), *sources, target])
        runpy.run_path(str(MAKE_LMDB), run_name="__main__")
        made = net(data_layer(Path(target), len(IMAGES)))().outputs
        found = made["x"].numpy()[np.argsort(made["y"].numpy()), 0]
        inner = found[:, margin : margin + 5, margin : margin + 5]
        assert np.array_equal(inner, images)
        assert found.shape[1:] == (5 + 2 * margin, 5 + 2 * margin)
        assert found.sum() == images.sum()


def test_data_bases_that_cannot_be_read_are_refused(tmp_path: Path):
    (tmp_path / "text").write_text("no data base")
    (tmp_path / "folder").mkdir()
    lmdb_of(tmp_path / "empty", [])
    lmdb_of(tmp_path / "short", [data(IMAGES[0], 1, data=b"abc")])
    lmdb_of(tmp_path / "broken", [b"\xff\xff"])
    lmdb_of(tmp_path / "cut", [data(IMAGES[0], 1, data=IMAGES[0].tobytes())] * 1000)
    os.truncate(tmp_path / "cut" / "data.mdb", 40_000)
    for name, why in {
        "none": "there is no data base",
        "text": "as an LMDB data base",
        "folder": "as an LMDB data base",
        "empty": "has no records",
        "short": "the data base is damaged",
        "broken": "a record of",
        "cut": "is cut off: .* bytes of it are missing",
    }.items():
        with pytest.raises(ValueError, match=f"layer 'd' .*{why}"):
            net(data_layer(tmp_path / name, 1))
    source = data_layer(tmp_path / "short", 1).replace("LMDB", "LEVELDB")
    with pytest.raises(ValueError, match="say backend: LMDB"):
        net(source)


def test_tables_in_hdf5(tmp_path: Path):
    rows = np.arange(10, dtype=np.float32)
    for name, part in (("a", rows[:6]), ("b", rows[6:])):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"], file["y"] = np.stack([part, part], 1), part
    (tmp_path / "list").write_text(f"{tmp_path}/a.h5\n{tmp_path}/b.h5\n")
    source = (
        'layer { name: "h" type: "HDF5Data" top: "x" top: "y" '
        f'hdf5_data_param {{ source: "{tmp_path}/list" batch_size: 4 SHUFFLE }} }}'
    )
    plain = net(source.replace("SHUFFLE", ""))
    assert plain.shapes == {"x": (4, 2), "y": (4,)}
    assert labels(plain, 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    shuffled = source.replace("SHUFFLE", "shuffle: true").replace("batch_size: 4", "batch_size: 5")
    pair = [net(shuffled, rank=rank, ranks=2) for rank in (0, 1)]
    seen = [labels(one, 1)[0] for one in pair]
    assert sorted(seen[0] + seen[1]) == list(range(10))
    assert seen[0] + seen[1] != [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    with pytest.raises(ValueError, match="no dataset 'z'"):
        net(source.replace('top: "y"', 'top: "z"').replace("SHUFFLE", ""))


def test_images_in_files(tmp_path: Path):
    for number, image in enumerate(IMAGES[:3]):
        cv2.imwrite(str(tmp_path / f"an image {number}.png"), image.transpose(1, 2, 0))
    (tmp_path / "list").write_text("".join(f"an image {n}.png {n}\n" for n in range(3)))
    source = (
        'layer { name: "i" type: "ImageData" top: "x" top: "y" transform_param { scale: 2 } '
        f'image_data_param {{ source: "{tmp_path}/list" root_folder: "{tmp_path}/" batch_size: 2 '
        "MORE } }"
    )
    made = net(source.replace("MORE", ""))
    result = made()
    assert np.array_equal(result.outputs["x"].numpy(), 2 * IMAGES[:2].astype(np.float32))
    assert labels(made, 1) == [[2, 0]]
    sized = net(source.replace("MORE", "new_height: 8 new_width: 9 is_color: false"))
    assert sized.shapes["x"] == (2, 1, 8, 9)
    with pytest.raises(ValueError, match="both new_height and new_width"):
        net(source.replace("MORE", "new_height: 8"))
    (tmp_path / "list").write_text("an image 0.png\n")
    with pytest.raises(ValueError, match="list:1: a line is"):
        net(source.replace("MORE", ""))


@pytest.mark.parametrize("missing", ["its end", "its lower half"])
def test_a_jpeg_that_is_cut_off_is_read_and_warned_of_once(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "cut.jpg"
    image = RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = cv2.imencode(".jpg", image)[1].tobytes()
    path.write_bytes(whole[: -2 if missing == "its end" else len(whole) // 2])
    wanted = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR).transpose(2, 0, 1)
    (tmp_path / "list").write_text(f"{path} 3\n")
    made = net(
        'layer { name: "d" type: "ImageData" top: "x" top: "y" '
        f'image_data_param {{ source: "{tmp_path}/list" batch_size: 2 }} }}'
    )
    found = made(keep=True).blobs["x"].numpy()
    made.close()
    rows = 64 if missing == "its end" else 8
    assert found.shape == (2, 3, 64, 64)
    assert np.array_equal(found[1][:, :rows], wanted[:, :rows])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("W")]
    assert line.endswith(f"{path} is cut off at its end: what is missing is made up")


def test_tables_of_several_shapes_are_told_apart(tmp_path: Path):
    for name, width in (("a", 2), ("b", 3)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"] = np.zeros((2, width), np.float32)
    (tmp_path / "list").write_text(f"{tmp_path}/a.h5\n{tmp_path}/b.h5\n")
    made = net(
        'layer { type: "HDF5Data" top: "x" '
        f'hdf5_data_param {{ source: "{tmp_path}/list" batch_size: 2 }} }}'
    )
    made()
    with pytest.raises(ValueError, match=r"rows of .*b\.h5 have .*those of .*a\.h5"):
        made()
    made.close()


def test_a_leveldb_becomes_an_lmdb(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = golden.SECOND / "data" / "leveldb_changed" / "train_leveldb"
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    target = tmp_path / "new"
    assert main(["caffe", "leveldb_to_lmdb", str(source), str(target)]) == 0
    found = list(opened(str(target), "LMDB").values())
    assert found == list(opened(str(source), "LEVELDB").values())
    assert f"Wrote {len(found)} records" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert main(["caffe", "leveldb_to_lmdb", str(source), str(target)]) == 2
    assert "name a new folder" in capsys.readouterr().err


def test_without_the_library_of_leveldb_there_is_a_way(monkeypatch: pytest.MonkeyPatch):
    source = golden.SECOND / "data" / "leveldb_log" / "train_leveldb"
    monkeypatch.setitem(sys.modules, "plyvel", None)
    with pytest.raises(ValueError, match=r"pip install 'soonest\[leveldb\]'; .* leveldb_to_lmdb"):
        opened(str(source), "LEVELDB")


def test_a_damaged_leveldb_is_refused(tmp_path: Path):
    source = golden.SECOND / "data" / "leveldb_table" / "train_leveldb"
    shutil.copytree(source, tmp_path / "base")
    (tmp_path / "base" / "CURRENT").write_text("MANIFEST-000099\n")
    with pytest.raises(ValueError, match="as a LevelDB data base"):
        opened(str(tmp_path / "base"), "LEVELDB")


@pytest.mark.parametrize("name", golden.index("data/index.json", golden.SECOND)["cases"])
def test_what_is_read_is_what_caffe_reads(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(golden.SECOND / "data" / name)
    for key, found, wanted in golden.data_arrays(name):
        assert found.shape == wanted.shape, key
        assert np.abs(found - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max()), key


def test_a_layer_opens_its_stream_anew_in_every_net(tmp_path: Path):
    lmdb_of(tmp_path / "db", [data(x, n, data=x.tobytes()) for n, x in enumerate(IMAGES)])
    source = data_layer(tmp_path / "db", 2)
    first, second = net(source), net(source, "TEST")
    assert labels(first, 1) == labels(second, 1) == [[0, 1]]
    assert isinstance(first.steps[0].layer, RecordLayer)


def test_batches_are_made_ahead_in_their_order():
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    ahead = Ahead(items(), 3)
    assert next(ahead) == 0
    until_s = time.monotonic() + 60
    while len(taken) < 4 and time.monotonic() < until_s:
        time.sleep(0.01)
    assert taken == [0, 1, 2, 3]
    assert [next(ahead) for _ in range(5)] == [1, 2, 3, 4, 5]
    ahead.close()


def test_a_damaged_record_is_told_of_in_its_turn(tmp_path: Path):
    records = [data(x, n, data=x.tobytes()) for n, x in enumerate(IMAGES)]
    lmdb_of(tmp_path / "db", [*records[:5], b"\xff\xff", *records[5:]])
    made = net(data_layer(tmp_path / "db", 2))
    assert labels(made, 2) == [[0, 1], [2, 3]]
    made.close()
    assert labels(made, 2) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"layer 'd' .*a record of"):
        made()
