"""What Caffe's messages look like, by another source than this package: a table, one fact a line.

It comes from the descriptor that protobuf's compiler made of Caffe's own definition, as the package
caffe-onnx on PyPI has it. That package does not import with a current protobuf, and need not:

    pip download --no-deps caffe-onnx==0.1.2
    python tests/caffe_schema.py caffe_onnx-0.1.2-py3-none-any.whl > tests/caffe_schema.txt
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

TABLE = Path(__file__).with_suffix(".txt")
PACKAGE = "caffe"

_Field = descriptor_pb2.FieldDescriptorProto
_LABELS = {1: "optional", 2: "required", 3: "repeated"}


def descriptor_of(wheel: str) -> descriptor_pb2.FileDescriptorProto:
    """The descriptor in a wheel of caffe-onnx, whose code is read but not run."""
    with zipfile.ZipFile(wheel) as files:
        tree = ast.parse(files.read("proto/caffe_pb2.py"))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb":
            assert isinstance(node.value, ast.Call)
            text = ast.literal_eval(node.value.args[0])
            return descriptor_pb2.FileDescriptorProto.FromString(text.encode("latin1"))
    raise ValueError(f"{wheel} has no descriptor")


def lines_of(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    """A line for each field and each enum."""
    for enum in file.enum_type:
        yield _enum_line(enum.name, enum)
    for message in file.message_type:
        for enum in message.enum_type:
            yield _enum_line(f"{message.name}.{enum.name}", enum)
        for field in message.field:
            type_name = field.type_name.removeprefix(f".{PACKAGE}.")
            words = [
                f"{message.name}.{field.name}", str(field.number), _LABELS[field.label],
                _Field.Type.Name(field.type).removeprefix("TYPE_").lower(),
            ]  # fmt: skip
            words += [type_name] if type_name else []
            words += ["packed"] if field.options.packed else []
            words += [f"default={field.default_value}"] if field.HasField("default_value") else []
            yield " ".join(words)


def _enum_line(name: str, enum: descriptor_pb2.EnumDescriptorProto) -> str:
    return " ".join(["enum", name, *(f"{value.name}={value.number}" for value in enum.value)])


def descriptor() -> descriptor_pb2.FileDescriptorProto:
    """What the table says, as protobuf's own description of a file."""
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package=PACKAGE)
    messages: dict[str, descriptor_pb2.DescriptorProto] = {}

    def message(name: str) -> descriptor_pb2.DescriptorProto:
        if name not in messages:
            messages[name] = file.message_type.add(name=name)
        return messages[name]

    for line in TABLE.read_text(encoding="utf-8").splitlines():
        first, *words = line.split(" ")
        if first == "enum":
            outer, _, inner = words[0].rpartition(".")
            enum = (message(outer) if outer else file).enum_type.add(name=inner)
            for word in words[1:]:
                name, number = word.split("=")
                enum.value.add(name=name, number=int(number))
        else:
            outer, _, name = first.partition(".")
            _add_field(message(outer), name, *words)
    return file


def _add_field(
    message: descriptor_pb2.DescriptorProto,
    name: str,
    number: str,
    label: str,
    type_: str,
    *more: str,
) -> None:
    field = message.field.add(name=name, number=int(number))
    field.label = _Field.Label.Value(f"LABEL_{label.upper()}")
    field.type = _Field.Type.Value(f"TYPE_{type_.upper()}")
    for word in more:
        if word.startswith("default="):
            field.default_value = word.removeprefix("default=")
        elif word == "packed":
            field.options.packed = True
        else:
            field.type_name = f".{PACKAGE}.{word}"


def classes() -> dict[str, Any]:
    """Protobuf's classes of the messages, by name."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor())
    return {
        one.name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"{PACKAGE}.{one.name}")
        )
        for one in descriptor().message_type
    }


def kind(field: Any) -> str:
    """The type of a field of such a class, as the table names it."""
    return _Field.Type.Name(field.type).removeprefix("TYPE_").lower()


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lines_of(descriptor_of(sys.argv[1])))
