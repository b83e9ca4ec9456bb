"""pycaffe's net, layer by layer, beside real Caffe: forward and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import golden_caffe as golden
from soonest import pycaffe as caffe

CASES = {
    f"{folder.name}/{name}": (folder / "layers", case)
    for folder in (golden.FOLDER, golden.SECOND)
    for name, case in golden.index("layers/index.json", folder)["cases"].items()
}
PHASES = {"TRAIN": caffe.TRAIN, "TEST": caffe.TEST}


def found(net: caffe.Net, kind: str, blob: str, number: list[str]) -> Any:
    if kind == "top":
        return net.blobs[blob].data
    if kind == "indiff":
        return net.blobs[blob].diff
    own = net.params[blob][int(number[0])]
    return own.diff if kind == "paramdiff" else own.data


@pytest.mark.parametrize("name", CASES)
def test_a_layer_gives_what_caffes_did(name: str, monkeypatch: pytest.MonkeyPatch):
    folder, case = CASES[name]
    monkeypatch.chdir(folder)
    net = caffe.Net(case["prototxt"], PHASES[case["phase"]])
    stored = np.load(Path(case["npz"]))
    keys = {key: key.split("/") for key in stored.files}
    for key, (kind, blob, *number) in keys.items():
        if kind == "param":
            net.params[blob][int(number[0])].data[...] = stored[key]
        elif kind == "in":
            net.blobs[blob].reshape(*stored[key].shape)
            net.blobs[blob].data[...] = stored[key]
    for _ in range(case["forward_passes"]):
        net.forward()
    if case["backward"]:
        for key, (kind, blob, *_number) in keys.items():
            if kind == "topdiff":
                net.blobs[blob].diff[...] = stored[key].reshape(net.blobs[blob].shape)
        net.backward()
    for key, (kind, blob, *number) in keys.items():
        if kind not in ("top", "indiff", "param_after", "paramdiff"):
            continue
        array = found(net, kind, blob, number)
        wanted = stored[key].reshape(array.shape)
        if wanted.size:
            apart = np.abs(array - wanted).max()
            assert apart <= 1e-5 * max(1.0, float(np.abs(wanted).max())), key
