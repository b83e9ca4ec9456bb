"""Our messages beside Caffe's own definition of them, and our files beside protobuf's."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given, settings

from helpers import caffe_schema
from helpers.caffe_strategies import messages
from soonest.caffe.proto import text
from soonest.caffe.proto.message import Message
from soonest.caffe.proto.schema import ENUMS, MESSAGES
from soonest.caffe.proto.wire import decode, encode

CLASSES = caffe_schema.classes()


def test_every_message_has_caffes_fields_numbers_types_and_defaults():
    assert set(MESSAGES) == set(CLASSES)
    fields = 0
    for name, class_ in CLASSES.items():
        own, theirs = MESSAGES[name].fields, class_.DESCRIPTOR.fields_by_name
        assert set(own) == set(theirs)
        for field in theirs.values():
            one = own[field.name]
            where = (name, field.name)
            assert one.number == field.number, where
            assert one.kind == caffe_schema.kind(field), where
            assert one.repeated == field.is_repeated, where
            assert one.packed == field.GetOptions().packed, where
            assert one.required == field.is_required, where
            if one.kind in ("message", "enum"):
                other = field.message_type or field.enum_type
                assert one.type_name == other.full_name.removeprefix("caffe."), where
            if not one.repeated and one.kind != "message":
                default: Any = field.default_value
                if one.kind == "enum":
                    default = field.enum_type.values_by_number[default].name
                if isinstance(default, float):
                    default = pytest.approx(default, rel=1e-6)
                assert one.default == default, where
            fields += 1
    assert fields > 400


def test_every_enum_has_caffes_names_and_numbers():
    enums = {
        enum.full_name.removeprefix("caffe."): enum
        for class_ in CLASSES.values()
        for enum in [
            *class_.DESCRIPTOR.enum_types,
            *class_.DESCRIPTOR.file.enum_types_by_name.values(),
        ]
    }
    assert set(enums) == set(ENUMS)
    for name, enum in enums.items():
        assert {value.name: value.number for value in enum.values} == ENUMS[name].values


@pytest.mark.parametrize("type_name", ["NetParameter", "SolverParameter", "SolverState", "Datum"])
def test_protobuf_reads_what_we_write_and_we_read_what_it_writes(type_name: str):
    @given(messages(type_name))
    @settings(max_examples=25)
    def check(message: Message) -> None:
        data = encode(message)
        theirs = CLASSES[type_name].FromString(data)
        assert theirs.SerializeToString(deterministic=True) == data
        assert decode(theirs.SerializeToString(), type_name) == message
        assert text_format.Parse(text.write(message), CLASSES[type_name]()) == theirs
        printed = text_format.MessageToString(theirs)
        assert text.parse(printed, type_name) == message

    check()


def test_protobuf_calls_the_same_bytes_damaged():
    for data in (bytes.fromhex("0a05616263"), bytes.fromhex("0000"), bytes.fromhex("0a8080")):
        with pytest.raises(ValueError, match="byte"):
            decode(data, "NetParameter")
        with pytest.raises(Exception, match="Error parsing"):
            CLASSES["NetParameter"].FromString(data)
