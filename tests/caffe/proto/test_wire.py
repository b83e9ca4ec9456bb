"""The binary format: bytes that protobuf writes, and bytes that nobody should write."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import golden_caffe as golden
from helpers.caffe_strategies import messages
from soonest.caffe.proto.message import Message
from soonest.caffe.proto.schema import MESSAGES
from soonest.caffe.proto.wire import WireError, decode, encode

NUMBERS = {
    ("NetParameter", "layer"): 100,
    ("NetParameter", "layers"): 2,
    ("LayerParameter", "blobs"): 7,
    ("BlobProto", "data"): 5,
    ("BlobProto", "diff"): 6,
    ("BlobProto", "shape"): 7,
    ("BlobProto", "double_data"): 8,
    ("SolverState", "history"): 3,
    ("Datum", "label"): 5,
}


def test_fields_have_caffes_numbers():
    assert {key: MESSAGES[key[0]].fields[key[1]].number for key in NUMBERS} == NUMBERS
    for message in MESSAGES.values():
        assert len(message.by_number) == len(message.fields)


def test_bytes_are_those_of_protobuf():
    layer = Message(
        "LayerParameter", name="a", loss_weight=[0.5], propagate_down=[True], phase="TEST"
    )
    layer.add("blobs", data=np.array([1.0], np.float32)).put("shape").dim = [1, 300]
    layer.put("embed_param").input_dim = 1
    layer.put("pooling_param")
    assert encode(layer) == bytes.fromhex(
        "0a0161" "2d0000003f" "3a0d" "2a040000803f" "3a050a0301ac02" "5001" "5801" "ca0700"
        "ca08021001"
    )  # fmt: skip
    assert encode(Message("FillerParameter", sparse=-1)) == bytes.fromhex("38ffffffffffffffffff01")


def test_numbers_are_read_packed_and_one_by_one():
    apart = bytes.fromhex("2d0000803f2a04000000402d00004040")
    assert list(decode(apart, "BlobProto").data) == [1, 2, 3]
    assert list(decode(bytes.fromhex("0a0201020803"), "BlobShape").dim) == [1, 2, 3]


def test_fields_that_caffe_does_not_know_are_skipped():
    unknown = bytes.fromhex("f83f01fa3f0161fb3f0801fc3ffd3f00000000f93f0000000000000000")
    assert decode(unknown + bytes.fromhex("0a0161"), "LayerParameter") == Message(
        "LayerParameter", name="a"
    )


def test_a_message_in_two_pieces_is_put_together():
    halves = bytes.fromhex("3202080132051a01611003")
    state = decode(halves, "NetParameter").state
    assert (state.phase, state.stage, state.level) == ("TEST", ["a"], 3)


def test_large_arrays_are_not_copied():
    blob = Message("BlobProto", data=np.arange(1_000_000, dtype=np.float32))
    data = encode(blob)
    tracemalloc.start()
    found = decode(data, "BlobProto")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found.data, blob.data)
    assert peak_bytes < 100_000


WRONG = {
    "a varint without end": (bytes.fromhex("0a" + "80" * 5), 1, "ends within a number"),
    "a varint too long": (bytes.fromhex("0a" + "ff" * 11), 1, "more than 10 bytes"),
    "a length beyond the end": (bytes.fromhex("0a05616263"), 1, "cut off"),
    "a huge length": (bytes.fromhex("0affffffff7f"), 1, "cut off"),
    "a length beyond its message": (bytes.fromhex("a20603" "0a0561" "000000"), 4, "cut off"),
    "field number 0": (bytes.fromhex("0000"), 0, "no field can start"),
    "wire type 7": (bytes.fromhex("0f"), 0, "no field can start"),
    "a group that is not closed": (bytes.fromhex("fb3f"), 0, "damaged"),
    "a group that was not opened": (bytes.fromhex("0c"), 0, "damaged"),
    "groups that cross": (bytes.fromhex("fb3f" "0b" "fc3f"), 0, "damaged"),
    "groups within each other": (bytes.fromhex("fb3f") * 101 + b"0", 0, "damaged"),
    "text": (b"name: 'a prototxt'", 0, "no field can start"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_its_place(what: str):
    data, offset, why = WRONG[what]
    with pytest.raises(WireError, match=why) as caught:
        decode(data, "NetParameter", file="x.caffemodel")
    assert caught.value.offset_bytes == offset
    assert str(caught.value).startswith(f"x.caffemodel, byte {offset}: ")


def test_floats_that_are_cut_off_are_refused():
    with pytest.raises(WireError, match="no whole number of float32"):
        decode(bytes.fromhex("2a03000000"), "BlobProto")


def test_messages_within_each_other_without_end_are_refused():
    data = b""
    for _ in range(200):  # A group is the only thing that nests at will.
        data = bytes.fromhex("fb3f") + data + bytes.fromhex("fc3f")
    with pytest.raises(WireError, match="damaged"):
        decode(data, "NetParameter")


def test_hostile_files_take_neither_memory_nor_time():
    many = bytes.fromhex("2d0000803f") * 50_000  # A float each.
    began = time.perf_counter()
    tracemalloc.start()
    assert len(decode(many, "BlobProto").data) == 50_000
    decode(b"\x08\x01" * 50_000, "NetParameter")
    decode(bytes.fromhex("2a00") * 50_000, "BlobProto")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10 * len(many)
    assert time.perf_counter() - began < 60


def test_more_values_than_any_net_has_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("soonest.caffe.proto.wire.decoder.MOST_BYTES", 300)
    for one in ("1a00", "2000"):  # Inputs, dimensions.
        decode(bytes.fromhex(one) * 150, "NetParameter")
        with pytest.raises(WireError, match="more than 300 bytes"):
            decode(bytes.fromhex(one) * 151, "NetParameter")
    with pytest.raises(WireError, match="more than 300 bytes"):
        decode(bytes.fromhex("a20600") * 20, "NetParameter")  # Layers.
    decode(bytes.fromhex("2a9003") + bytes(400), "BlobProto")  # Arrays do not count.


def test_a_message_longer_than_protobuf_reads_is_not_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("soonest.caffe.proto.wire.encoder.MOST_BYTES", 99)
    with pytest.raises(ValueError, match="HDF5"):
        encode(Message("NetParameter", name="x" * 100))


@given(messages("NetParameter"))
@settings(max_examples=60)
def test_writing_is_the_inverse_of_reading(message: Message):
    assert decode(encode(message), "NetParameter") == message


def _error(data: bytes, type_name: str) -> WireError | None:
    """Why these bytes are refused; if they are not, they can be written."""
    try:
        encode(decode(data, type_name))
    except WireError as error:
        return error
    return None


@given(st.binary(max_size=80), st.sampled_from(["NetParameter", "SolverState", "Datum"]))
@example(bytes.fromhex("fb3ffb3f0a"), "Datum")
@settings(max_examples=300)
def test_any_bytes_are_read_or_refused_with_a_place_in_them(data: bytes, type_name: str):
    error = _error(data, type_name)
    assert error is None or 0 <= error.offset_bytes <= len(data)


@given(messages("NetParameter"), st.data())
@settings(max_examples=100)
def test_damaged_files_are_read_or_refused(message: Message, data: st.DataObject):
    whole = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    error = _error(cut, "NetParameter")
    assert error is None or 0 <= error.offset_bytes <= len(cut)


def test_every_golden_file_is_written_back_byte_by_byte():
    refused: list[str] = []
    count = 0
    for path in sorted(golden.FOLDER.rglob("*.caffemodel")) + sorted(
        golden.FOLDER.rglob("*.solverstate")
    ):
        type_name = "SolverState" if path.suffix == ".solverstate" else "NetParameter"
        data = path.read_bytes()
        count += 1
        try:
            assert encode(decode(data, type_name)) == data, path
        except WireError:
            refused.append(path.name)
    assert count > 80
    assert sorted(refused) == ["truncated.caffemodel", "truncated.solverstate"]
