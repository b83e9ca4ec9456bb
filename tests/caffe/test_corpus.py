"""Every kind of text that people's files have been found to hold, and what becomes of it."""

from __future__ import annotations

import pytest

from soonest.caffe.io import upgrade
from soonest.caffe.proto import text
from soonest.caffe.proto.text import TextError, parse

READ: dict[str, tuple[str | bytes, str]] = {
    "today's form": (
        'layer { name: "a" type: "ReLU" bottom: "x" top: "x" }',
        'layer { name: "a" type: "ReLU" bottom: "x" top: "x" }',
    ),
    "V1": (
        'layers { name: "a" type: RELU bottom: "x" top: "x" blobs_lr: 1 blobs_lr: 2 }',
        'layer { name: "a" type: "ReLU" bottom: "x" top: "x" param { lr_mult: 1 } '
        "param { lr_mult: 2 } }",
    ),
    "V0": (
        'layers { layer { name: "a" type: "conv" num_output: 2 kernelsize: 3 } bottom: "x" '
        'top: "y" }',
        'layer { name: "a" type: "Convolution" bottom: "x" top: "y" '
        "convolution_param { num_output: 2 kernel_size: 3 } }",
    ),
    "an input with dimensions": (
        'input: "x" input_dim: 1 input_dim: 2 input_dim: 3 input_dim: 4',
        'layer { name: "input" type: "Input" top: "x" input_param { shape '
        "{ dim: 1 dim: 2 dim: 3 dim: 4 } } }",
    ),
    "nothing": ("", ""),
    "only a comment": ("# nothing", ""),
    "comments with marks": ('name: "a" # } " { \' :\n# "', 'name: "a"'),
    "a comment in Latin-1": (b'# caf\xe9\nname: "a"', 'name: "a"'),
    "a comment in GBK": ("# \u5c42\n".encode("gbk") + b'name: "a"', 'name: "a"'),
    "a name in Latin-1": (b'name: "caf\xe9"', 'name: "caf\\351"'),
    "a name in UTF-8": ('name: "\u5c42"', 'name: "\\345\\261\\202"'),
    "a name with a letter's number": ('name: "\\u00e9\\U0001F600"', 'name: "é\U0001f600"'),
    "line ends of Windows": ('name: "a"\r\nforce_backward: true\r\n', 'name:"a" force_backward:1'),
    "tabs and form feeds": ('\tname:\f"a"\v', 'name: "a"'),
    "commas and semicolons": ('name: "a", state { level: 1; };', 'name: "a" state { level: 1 }'),
    "angles, and a colon before": ("state: < level: 1 >", "state { level: 1 }"),
    "lists": (
        "input_dim: [1, 2] layer: [{}, {type: 'a'}] input_dim: []",
        "input_dim: 1 input_dim: 2 layer { } layer { type: 'a' }",
    ),
    "strings in pieces": ("name: 'a' \"b\"\n  'c'", 'name: "abc"'),
    "quotes in quotes": ("name: 'a\"b\\'c'", 'name: "a\\"b\'c"'),
    "escapes": ('name: "\\t\\x41\\101\\\\n"', 'name: "\tAA\\\\n"'),
    "numbers in other bases": ("input_dim: 0x10 input_dim: 010", "input_dim: 16 input_dim: 8"),
    "fractions": (
        "layer { loss_weight: 1.f loss_weight: .5 loss_weight: 5. loss_weight: 1E-2f "
        "loss_weight: -inf loss_weight: 3 loss_weight: 1e99 }",
        "layer { loss_weight: 1 loss_weight: 0.5 loss_weight: 5 loss_weight: 0.01 "
        "loss_weight: -inf loss_weight: 3 loss_weight: inf }",
    ),
    "yes and no": (
        "layer { propagate_down: true propagate_down: 1 propagate_down: t propagate_down: True "
        "propagate_down: false propagate_down: 0 propagate_down: f propagate_down: False }",
        "layer { propagate_down: [1, 1, 1, 1, 0, 0, 0, 0] }",
    ),
    "a sign apart from its number": (
        "name: '- 1' layer { loss_weight: -  1.5 } # - 2",
        "name: '- 1' layer { loss_weight: -1.5 }",
    ),
    "an enum by number": ("state { phase: 0 }", "state { phase: TRAIN }"),
    "no spaces": ('layer{name:"a"top:"b"}', 'layer { name: "a" top: "b" }'),
}
"""Per kind, a text, and one that means the same."""

REFUSED: dict[str, tuple[str | bytes, int, str]] = {
    "a number that runs into a name": ("layer {\n pooling_param { stride: 2pad: 1 } }", 2, "2pad"),
    "a byte order mark": (b'\xef\xbb\xbfname: "a"', 1, "byte order mark"),
    "a path of Windows": ('\n\nname: "C:\\Users\\me"', 3, "write / or"),
    "a path of Windows that is no escape": ('name: "C:\\models"', 1, "write / or"),
    "a field of a fork": ("layer {\n pooling_param { ceil_mode: true } }", 2, "round_mode"),
    "a message of a fork": ("layer {\n reorg_param { stride: 2 } }", 2, "no field 'reorg_param'"),
    "an enum of a fork": ("layers { type:\n REORG }", 2, "ABSVAL"),
    "a field given twice": ('name: "a"\nname: "b"', 2, "given twice"),
    "a message given twice": ("state { }\nstate { }", 2, "given twice"),
    "a bracket too few": ("layer {\n name: 'a'\n", 3, "starts in line 1"),
    "a bracket too few before a layer": ("layer {\n\nlayer { }", 3, "bracket not closed"),
    "a bracket too many": ("layer { }\n}", 2, "closes nothing"),
    "a word before a bracket too many": ("layer {\n nam: 1 } }", 2, "no field 'nam'"),
    "another bracket": ("layer {\n>", 2, "expected '}'"),
    "a string for a number": ('input_dim:\n "3"', 2, "whole number"),
    "a number for a string": ("name: 3", 1, "text in quotes"),
    "a fraction for a whole number": ("input_dim: 1.0", 1, "whole number"),
    "a whole number too large": ("input_dim: 2147483648", 1, "out of range"),
    "a negative number for a count": ("layer { pooling_param { pad: -1 } }", 1, "out of range"),
    "no colon": ('name "a"', 1, "':'"),
    "a string over lines": ('name: "a\nb"', 1, "does not end"),
    "YAML": ("- name: a", 1, "name of a field"),
    "XML": ("<net>", 1, "name of a field"),
    "a fullwidth colon": ('name\uff1a "a"', 1, "cannot read"),
    "a space that is no space": ('name:\u00a0"a"', 1, "cannot read"),
    "a curly quote": ("name: \u201ca\u201d", 1, "cannot read"),
    "an underscore in a number": ("input_dim: 1_0", 1, "cannot read"),
    "a field that must be there": ("layer {\n clip_param { min: 0 } }", 2, "'max'"),
}


@pytest.mark.parametrize("kind", READ)
def test_this_kind_is_read(kind: str):
    source, plain = READ[kind]
    found = upgrade.net(parse(source, "NetParameter"))
    assert found == upgrade.net(parse(plain, "NetParameter"))
    assert parse(text.write(found), "NetParameter") == found


@pytest.mark.parametrize("kind", REFUSED)
def test_this_kind_is_refused_with_its_line(kind: str):
    source, line, what = REFUSED[kind]
    with pytest.raises(TextError, match=what) as caught:
        parse(source, "NetParameter")
    assert caught.value.line == line
