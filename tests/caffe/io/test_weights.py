"""Files of weights and states, binary and HDF5."""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from helpers import golden_caffe as golden
from soonest.caffe.io import hdf5, solver_state, weights
from soonest.caffe.io.blobs import fits, shape_of, to_array, to_blob
from soonest.caffe.io.solver_state import State
from soonest.caffe.proto.message import Message
from soonest.caffe.proto.text import parse

ARRAYS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.float32([7, 8])]


def test_blobs_of_every_age():
    old = parse("num: 1 channels: 1 height: 2 width: 2 data: [1, 2, 3, 4]", "BlobProto")
    assert to_array(old, "it").tolist() == [[[[1, 2], [3, 4]]]]
    double = parse("shape { dim: 2 } double_data: [1, 2]", "BlobProto")
    assert to_array(double, "it").dtype == np.float32
    assert shape_of(to_blob(ARRAYS[0])) == (2, 3)
    assert to_array(to_blob(np.float32(5)), "it") == 5


@pytest.mark.parametrize(
    "source", ["shape { dim: 3 } data: 1", "shape { dim: -1 }", "data: [1, 2]"]
)
def test_blobs_whose_shape_does_not_fit_are_refused(source: str):
    with pytest.raises(ValueError, match="blob 3 of x"):
        to_array(parse(source, "BlobProto"), "blob 3 of x")


def test_a_shape_that_asks_for_more_memory_than_there_is_takes_none():
    with pytest.raises(ValueError, match="asks for"):
        to_array(parse("shape { dim: 4000000000 dim: 4000000000 } data: 1", "BlobProto"), "it")


def test_old_shapes_fit_with_ones_in_front():
    assert fits((1, 1, 1, 10), (10,))
    assert fits((1, 1, 5, 24), (5, 24))
    assert not fits((1, 1, 24, 5), (5, 24))
    assert not fits((10,), (1, 10))


@pytest.mark.parametrize("ending", ["solverstate", "solverstate.h5"])
def test_a_state_comes_back(tmp_path: Path, ending: str):
    path = tmp_path / f"x.{ending}"
    State(7, "x.caffemodel", ARRAYS, 3).write(path)
    found = solver_state.read(path)
    assert (found.iteration, found.learned_net, found.current_step) == (7, "x.caffemodel", 3)
    assert all(np.array_equal(a, b) for a, b in zip(found.history, ARRAYS, strict=True))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_weights_come_back(tmp_path: Path):
    layers = {"data": {}, "inception/1x1": dict(enumerate(ARRAYS))}
    weights.write_hdf5(tmp_path / "a.caffemodel.h5", layers)
    net = Message("NetParameter")
    net.add("layer", name="data")
    net.add("layer", name="inception/1x1", blobs=[to_blob(array) for array in ARRAYS])
    weights.write_message(tmp_path / "a.caffemodel", net)
    for name in ("a.caffemodel", "a.caffemodel.h5"):
        found = weights.read(tmp_path / name)
        assert set(found) == set(layers)
        assert np.array_equal(found["inception/1x1"][0], ARRAYS[0])


def test_weights_are_read_where_they_stand(tmp_path: Path):
    path = tmp_path / "a.caffemodel"
    large = np.arange(2_000_000, dtype=np.float32)
    net = Message("NetParameter")
    net.add("layer", name="fc", blobs=[to_blob(large)])
    weights.write_message(path, net)
    tracemalloc.start()
    found = weights.read(path)["fc"][0]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 200_000
    weights.write_message(path, Message("NetParameter"))  # Takes its place.
    assert np.array_equal(found, large)
    assert weights.read(path) == {}


def test_more_than_ten_blobs_keep_their_order(tmp_path: Path):
    path = tmp_path / "x.h5"
    State(1, "", [np.float32([number]) for number in range(12)]).write(path)
    assert [int(array[0]) for array in solver_state.read(path).history] == list(range(12))


@pytest.mark.parametrize("names", [["conv1", "conv1/bn"], ["conv1/bn", "conv1"], ["a/b/c", "a"]])
def test_the_name_of_a_layer_may_begin_with_that_of_another(names: list[str], tmp_path: Path):
    layers = {name: dict(enumerate(ARRAYS[: 1 + place])) for place, name in enumerate(names)}
    weights.write_hdf5(tmp_path / "x.h5", {**layers, "none": {}})
    found = weights.read(tmp_path / "x.h5")
    assert set(found) == {*names, "none"}
    for name, blobs in layers.items():
        assert len(found[name]) == len(blobs)
        for number, array in blobs.items():
            assert np.array_equal(found[name][number], array)


def test_damaged_hdf5_is_refused(tmp_path: Path):
    path = tmp_path / "x.caffemodel.h5"
    weights.write_hdf5(path, {"conv": dict(enumerate(ARRAYS))})
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"x\.caffemodel\.h5"):
            weights.read(path)
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(ValueError):  # Any other error fails the test.
            weights.read(path)


def test_hdf5_that_claims_more_than_it_has_takes_no_memory(tmp_path: Path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data/a/0", data=np.zeros(10**6, np.float32), compression="gzip")
    assert weights.read(path)["a"][0].shape == (10**6,)
    with h5py.File(path, "a") as file:
        file.create_dataset("data/a/1", shape=(2**42,), dtype=np.float32)
    with pytest.raises(ValueError, match=r"blob 1 of layer 'a' of .* asks for"):
        weights.read(path)
    for name, made in {
        "iter": {"shape": (2**42,), "dtype": np.int32},
        "learned_net": {"shape": (), "dtype": "S2000000000"},
    }.items():
        State(1, "a", []).write(path)
        with h5py.File(path, "a") as file:
            del file[name]
            file.create_dataset(name, **made)
        with pytest.raises(ValueError, match=f"{name} of .* asks for"):
            solver_state.read(path)


NO_STATE = {"iter": "text", "learned_net": [1.5], "history": [1], "current_step": [1, 2]}


@pytest.mark.parametrize("name", NO_STATE)
def test_hdf5_with_something_else_in_a_place_is_refused(tmp_path: Path, name: str):
    path = tmp_path / "x.h5"
    State(1, "a", []).write(path)
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = NO_STATE[name]
    with pytest.raises(ValueError, match=f"{name} of "):
        solver_state.read(path)


def test_what_cannot_be_written_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="make sure that its folder exists"):
        weights.write_message(tmp_path / "none" / "x.caffemodel", Message("NetParameter"))


def test_hdf5_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "x.h5"
    State(1, "", []).write(path)
    with pytest.raises(ValueError, match="holds no weights"):
        weights.read(path)
    weights.write_hdf5(path, {"conv": {}})
    with pytest.raises(ValueError, match="no solver's state"):
        solver_state.read(path)
    with h5py.File(path, "w") as file:
        file["data"] = [1]
    with pytest.raises(ValueError, match="no group of layers"):
        weights.read(path)


def test_both_formats_of_the_same_weights_are_equal():
    folder = golden.FOLDER / "legacy" / "hdf5"
    for name in ("init.caffemodel", "expected/snap_iter_20.caffemodel"):
        binary, table = weights.read(folder / name), weights.read(folder / f"{name}.h5")
        assert sum(map(len, table.values())) == 5
        for layer, blobs in table.items():
            for number, array in blobs.items():
                assert np.array_equal(array, binary[layer][number])


def test_rows_are_put_behind_those_that_are_there(tmp_path: Path):
    path = str(tmp_path / "x.h5")
    hdf5.append(path, {"a": np.float32([[1, 2], [3, 4]])}, new=True)
    hdf5.append(path, {"a": np.float32([[5, 6]])}, new=False)
    with h5py.File(path) as file:
        assert file["a"][()].tolist() == [[1, 2], [3, 4], [5, 6]]
    with pytest.raises(ValueError, match=r"rows of 'a' in .* have the shape \[2\]"):
        hdf5.append(path, {"a": np.float32([[1, 2, 3]])}, new=False)
    hdf5.append(path, {"a": np.float32([[7, 8, 9]])}, new=True)
    with h5py.File(path) as file:
        assert file["a"][()].tolist() == [[7, 8, 9]]
