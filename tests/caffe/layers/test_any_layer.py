"""Layers with any settings: made, or refused with their line; and then of the shapes they say."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soonest.caffe.layers.base import MANY
from soonest.caffe.net.net import Net, Result
from soonest.caffe.net.registry import LAYERS
from soonest.caffe.proto import text
from soonest.caffe.proto.message import Message
from soonest.caffe.proto.schema import MESSAGES, Field

READERS = {"Data", "HDF5Data", "HDF5Output", "ImageData", "Python", "WindowData"}
"""These read and write files, or run programs."""
SHAPES = ([2, 3, 6, 6], [2, 3, 6, 6], [2, 3], [2, 3, 4], [2], [1, 1, 1, 1], [])
WORDS = ["", "xavier", "constant", "gaussian", "bilinear", "uniform", "positive_unitball", "x"]
REALS = [0.0, 0.5, 1.0, 2.0, -1.0, float("inf"), float("nan"), 1e30]
WHOLE = [0, 1, 1, 1, 2, 2, 3, 5, 100_000]
SIMPLE: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "string": st.sampled_from(WORDS),
    "bytes": st.just(b""),
    **dict.fromkeys(("float", "double"), st.sampled_from(REALS)),
    **dict.fromkeys(("uint32", "uint64"), st.sampled_from(WHOLE)),
    **dict.fromkeys(("int32", "int64"), st.sampled_from([-2, -1, *WHOLE])),
}
SETTINGS = {
    name.removesuffix("_param").replace("_", ""): name
    for name, field in MESSAGES["LayerParameter"].fields.items()
    if field.kind == "message"
}


@cache
def values(field: Field) -> st.SearchStrategy[Any]:
    if field.kind == "message":
        one = messages(field.type_name)
    elif field.kind == "enum":
        one = st.sampled_from(sorted(field.enum.values))
    else:
        one = SIMPLE[field.kind]
    return st.lists(one, min_size=1, max_size=3) if field.repeated else one


@cache
def messages(type_name: str) -> st.SearchStrategy[Message]:
    fields = MESSAGES[type_name].fields
    needed = {name: values(field) for name, field in fields.items() if field.required}
    rest = {name: values(field) for name, field in fields.items() if not field.required}
    return st.fixed_dictionaries(needed, optional=rest).map(
        lambda found: Message(type_name, **found)
    )


@st.composite
def nets(draw: st.DrawFn) -> Message:
    type_ = draw(st.sampled_from(sorted(set(LAYERS) - READERS)))
    (fewest, most), (fewest_tops, most_tops) = LAYERS[type_].bottoms, LAYERS[type_].tops
    net = Message("NetParameter")
    bottoms = [f"b{n}" for n in range(draw(st.integers(fewest, max(fewest, min(most, 2)))))]
    for name in bottoms:
        layer = net.add("layer", name=name, type="Input", top=[name])
        layer.put("input_param").add("shape", dim=draw(st.sampled_from(SHAPES)))
    most_tops = max(fewest_tops, 1, most_tops if most_tops < MANY else 2)
    count = draw(st.integers(fewest_tops, most_tops))
    tops = [f"t{n}" for n in range(count)]
    layer = net.add("layer", name="it", type=type_, bottom=bottoms, top=tops)
    own = SETTINGS.get(type_.lower(), "softmax_param")
    setattr(layer, own, draw(messages(MESSAGES["LayerParameter"].fields[own].type_name)))
    return net


def _run(net: Message, phase: str) -> tuple[Net, Result] | str:
    """The net and what it gives, or why it is refused."""
    try:
        made = Net(net, phase, file="net.prototxt")
        return made, made(keep=True)
    except ValueError as error:
        return str(error)


@given(nets(), st.sampled_from(["TRAIN", "TEST"]))
@settings(max_examples=400)
def test_a_layer_is_made_as_it_says_or_refused_with_its_line(net: Message, phase: str):
    found = _run(text.parse(text.write(net), "NetParameter"), phase)
    if isinstance(found, str):
        assert re.match(r"net\.prototxt:\d+: layer '", found)
        return
    made, result = found
    if made.steps[-1].layer.spec.type != "Filter":  # How much is left only values say.
        assert {name: tuple(blob.shape) for name, blob in result.blobs.items()} == made.shapes
    if result.loss.requires_grad:
        result.loss.backward()


@given(nets(), st.lists(st.sampled_from(SHAPES), min_size=2, max_size=2))
@settings(max_examples=300)
def test_a_later_pass_may_have_other_shapes_or_is_refused_with_its_line(
    net: Message, shapes: list[list[int]]
):
    try:
        made = Net(text.parse(text.write(net), "NetParameter"), "TRAIN", file="net.prototxt")
    except ValueError:
        return
    names = [step.tops[0] for step in made.steps if step.layer.spec.type == "Input"]
    try:
        loss = made(
            {name: torch.zeros(shape) for name, shape in zip(names, shapes, strict=False)}
        ).loss
    except ValueError as error:
        assert re.match(r"net\.prototxt:\d+: layer '", str(error))  # noqa: PT017
        return
    if loss.requires_grad:
        loss.backward()


SPECIAL = {
    "power_param { power: -1 scale: 0 }": float("inf"),
    "power_param { power: 0.5 scale: 0 shift: 4 }": 2.0,
    "power_param { power: 0 scale: 3 }": 1.0,
    "exp_param { shift: 1000 }": float("inf"),
}


@pytest.mark.parametrize("spec", SPECIAL)
def test_what_c_computes_where_python_raises(spec: str):
    kind = spec.partition("_")[0].title()
    source = (
        'layer { type: "Input" top: "x" input_param { shape { dim: 1 } } } '
        f'layer {{ type: "{kind}" bottom: "x" top: "y" {spec} }}'
    )
    top = Net(text.parse(source, "NetParameter"))({"x": torch.ones(1)}).outputs["y"]
    assert top.tolist() == [SPECIAL[spec]]
