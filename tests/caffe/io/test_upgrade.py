"""Old forms of nets and solvers."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import golden_caffe as golden
from soonest.caffe.io import prototxt, upgrade
from soonest.caffe.proto import text
from soonest.caffe.proto.message import Message
from soonest.caffe.proto.text import parse

CASES = {
    "v0_net.prototxt", "v1_inputs.prototxt", "old_batchnorm.prototxt", "v1_train/solver.prototxt",
    "v1_train/train_val.prototxt",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_old_definitions_become_what_caffes_own_tool_makes_of_them(name: str):
    path = golden.FOLDER / "legacy" / name
    read = prototxt.read_solver if path.stem == "solver" else prototxt.read_net
    wanted = path.with_name(f"{path.stem}.upgraded.prototxt").read_text(encoding="utf-8")
    assert text.write(read(path)) == wanted


def upgraded(source: str) -> Message:
    return upgrade.net(parse(source, "NetParameter"))


def test_old_data_layers_give_their_scaling_to_the_transformation():
    layer = upgraded(
        'layers { name: "d" type: IMAGE_DATA '
        'image_data_param { source: "s" scale: 2 mirror: true } }'
    ).layer[0]
    assert (layer.type, layer.image_data_param.source) == ("ImageData", "s")
    assert (layer.transform_param.scale, layer.transform_param.mirror) == (2, True)
    assert not layer.image_data_param.has("scale")


def test_the_oldest_data_layer():
    layer = upgraded(
        'layers { layer { name: "d" type: "data" source: "s" meanfile: "m" batchsize: 4 '
        'cropsize: 9 } top: "x" }'
    ).layer[0]
    assert (layer.type, layer.data_param.batch_size) == ("Data", 4)
    assert (layer.transform_param.mean_file, layer.transform_param.crop_size) == ("m", 9)


def test_names_of_shared_blobs_are_kept():
    layer = upgraded('layers { type: RELU param: "w" param: "" blobs_lr: 3 }').layer[0]
    assert layer.type == "ReLU"
    assert [(one.name, one.lr_mult) for one in layer.param] == [("w", 3), ("", 1)]


def test_a_field_that_an_old_layer_cannot_have_is_told_of_and_left_out():
    said: list[str] = []
    source = 'layers { layer { name: "n" type: "relu" pad: 1 } }'
    layer = upgrade.net(parse(source, "NetParameter"), warn=said.append).layer[0]
    assert said == ["layer 'n' (line 1): Unknown parameter pad for layer type relu; it is left out"]
    assert set(layer.values) == {"name", "type"}


def test_inputs_without_sizes_only_name_what_a_layer_makes():
    source = 'input: "x" layer { name: "x" type: "Input" top: "x" }'
    assert [layer.type for layer in upgraded(source).layer] == ["Input"]


WRONG = {
    "layer { } layers { }": "both 'layer' and 'layers'",
    'input: "a" input_dim: 1': "give four for each",
    'input: "a" input: "b" input: "c" input_shape { } input_shape { }': "give one for each",
    'layers { layer { name: "n" type: "conf" } }': r"layer 'n' \(line 1\) has the type 'conf'",
    'layers { layer { type: "relu" } } layers { name: "n" type: RELU }': "the same form",
    'layers { layer { type: "padding" pad: 1 } top: "p" bottom: "d" } '
    'layers { layer { name: "n" type: "relu" } bottom: "p" }': "reads padding 'p'",
    'input: "a" input_shape { } input_dim: 1': "both 'input_shape' and 'input_dim'",
    'layers { layer { type: "padding" } }': "needs one bottom and one top",
}


@pytest.mark.parametrize("source", WRONG)
def test_what_cannot_be_upgraded_is_refused(source: str):
    with pytest.raises(ValueError, match=WRONG[source]):
        upgraded(source)


def test_a_solver_has_one_type():
    both = parse('type: "SGD" solver_type: ADAM', "SolverParameter")
    with pytest.raises(ValueError, match="both 'type' and 'solver_type'"):
        upgrade.solver(both)


def test_a_file_that_is_not_there_is_said_with_the_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="relative to the folder"):
        prototxt.read_net(tmp_path / "none.prototxt")
    (tmp_path / "both.prototxt").write_text("layer { } layers { }")
    with pytest.raises(ValueError, match=r"both\.prototxt: the net has both"):
        prototxt.read_net(tmp_path / "both.prototxt")
