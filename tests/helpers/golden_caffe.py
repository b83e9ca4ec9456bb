"""Results of real Caffe that the tests compare with; each set has a README that explains it.

They are in ``caffe/golden.tar.xz``, which the first process of a test run unpacks for all.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soonest.caffe.io import prototxt, solver_state, weights
from soonest.caffe.layers.base import gradient
from soonest.caffe.net.net import Net
from soonest.caffe.proto.message import Message
from soonest.caffe.solver.training import Trainer

WEIGHTS = HISTORY = 1e-5
"""How far trained weights may be apart, and histories as a part of their peak."""
_ARCHIVE = Path(__file__).parents[1] / "caffe" / "golden.tar.xz"
_PLACE = "SOONEST_CAFFE_GOLDEN"


def _unpacked() -> Path:
    if _PLACE not in os.environ:  # Processes that this one starts find it there.
        folder = tempfile.mkdtemp(prefix="soonest-caffe-golden-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        with tarfile.open(_ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        os.environ[_PLACE] = folder
    return Path(os.environ[_PLACE])


FOLDER = _unpacked() / "first"
SECOND = FOLDER.parent / "second"


def index(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """An index file as it is."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def layer_arrays(name: str, folder: Path = FOLDER) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Runs a case of one layer and yields each array's key, what we found and what Caffe did.

    The files that a net reads must be in the working directory.
    """
    case = index("layers/index.json", folder)["cases"][name]
    made = Net(prototxt.read_net(folder / "layers" / case["prototxt"]), case["phase"])
    stored = np.load(folder / "layers" / case["npz"])
    layers = {step.layer.spec.name: step.layer for step in made.steps}
    fed: dict[str, torch.Tensor] = {}
    for key in stored.files:
        kind, blob, *number = key.split("/")
        value = torch.from_numpy(stored[key])
        if kind == "param":
            with torch.no_grad():
                layers[blob].blobs()[int(number[0])].copy_(value)
        elif kind == "in":
            fed[blob] = value.requires_grad_(f"indiff/{blob}" in stored.files)
    for _ in range(case["forward_passes"]):
        result = made(fed, keep=True)
    sent = {key[8:]: stored[key] for key in stored.files if key.startswith("topdiff/")}
    sent = {blob: value for blob, value in sent.items() if result.blobs[blob].requires_grad}
    if case["backward"]:
        torch.autograd.backward(
            [result.blobs[blob] for blob in sent],
            [
                torch.from_numpy(value).reshape(result.blobs[blob].shape)
                for blob, value in sent.items()
            ],
        )
    for key in stored.files:
        kind, blob, *number = key.split("/")
        own = layers[blob].blobs()[int(number[0])] if number else None
        if kind in ("top", "indiff"):
            found = result.blobs[blob] if kind == "top" else fed[blob].grad
        else:
            found = gradient(own) if kind == "paramdiff" and own is not None else own
        if kind in ("top", "indiff", "param_after", "paramdiff"):
            assert found is not None
            yield key, found.detach().numpy(), stored[key]


def data_arrays(name: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Runs a case that reads files, in its folder, and yields as ``layer_arrays`` does."""
    case = index("data/index.json", SECOND)["cases"][name]
    made = Net(prototxt.read_net(case["prototxt"]), case["phase"])
    stored = np.load(case["npz"])
    layers: dict[str, Any] = {step.layer.spec.name: step.layer for step in made.steps}
    for key in stored.files:
        kind, layer, *number = key.split("/")
        if kind == "param":
            with torch.no_grad():
                layers[layer].blobs()[int(number[0])].copy_(torch.from_numpy(stored[key]))
    if case.get("memory"):
        layers["data"].put(*(torch.from_numpy(stored[f"in/{one}"]) for one in ("data", "label")))
    for number in range(case["passes"]):
        blobs = made(keep=True).blobs
        for blob in case["blobs"]:
            key = f"pass{number}/{blob}"
            yield key, blobs[blob].detach().numpy(), stored[key]
    made.close()


class Run:
    """One training of a case, with what it said and every loss.

    Args:
        solver: its ``SolverParameter``.
        prefix: of the files that it saves.
        start: weights, or a state to go on from.
        resume: which of these it is.
    """

    def __init__(self, solver: Message, prefix: Path, start: str, *, resume: bool) -> None:
        self.lines: list[str] = []
        self.losses: list[float] = []
        solver.snapshot_prefix = str(prefix)
        trainer = Trainer(solver, say=self.lines.append)
        update = trainer.optimizer.step

        def step(*arguments: Any) -> Any:
            self.losses.append(trainer.loss)
            return update(*arguments)

        trainer.optimizer.step = step  # type: ignore[method-assign]
        if resume:
            trainer.resume(start)
        else:
            trainer.finetune([start])
        trainer.solve()


def trained_apart(
    folder: Path, stem: str, prefix: Path, iteration: int, ending: str
) -> tuple[float, float]:
    """How far a snapshot is from what Caffe came to: weights, and histories over their peak.

    Args:
        folder: of the case.
        stem: of Caffe's files in it.
        prefix: of ours.
        iteration: of ours.
        ending: of both, ``.h5`` or none.
    """
    found = weights.read(f"{prefix}_iter_{iteration}.caffemodel{ending}")
    wanted = weights.read(folder / "expected" / f"{stem}.caffemodel{ending}")
    weights_apart = max(
        float(np.abs(found[layer][number] - array).max())
        for layer, blobs in wanted.items()
        for number, array in blobs.items()
    )
    mine = solver_state.read(f"{prefix}_iter_{iteration}.solverstate{ending}")
    theirs = solver_state.read(folder / "expected" / f"{stem}.solverstate{ending}")
    assert (mine.iteration, mine.current_step) == (theirs.iteration, theirs.current_step)
    peak = max(1e-3, *(float(np.abs(array).max()) for array in theirs.history))
    pairs = zip(mine.history, theirs.history, strict=True)
    return weights_apart, max(float(np.abs(a - b).max()) for a, b in pairs) / peak


def compare(folder: Path, stem: str, prefix: Path, iteration: int, ending: str) -> None:
    """Compares a snapshot with what Caffe came to; see ``trained_apart``."""
    weights_apart, history_apart = trained_apart(folder, stem, prefix, iteration, ending)
    assert weights_apart <= WEIGHTS
    assert history_apart <= HISTORY
