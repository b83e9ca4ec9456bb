"""Where the results of real Caffe are that the tests compare with, read in place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soonest.caffe import state, weights

WEIGHTS = HISTORY = 1e-5
"""How far trained weights may be apart, and histories as a part of their peak."""
PLACE = "SOONEST_CAFFE_GOLDEN"


def _find() -> Path | None:
    """Beside the repository, or beside the folder that it is in."""
    if PLACE in os.environ:
        return Path(os.environ[PLACE]).resolve()
    above = Path(__file__).resolve().parents[1]
    for folder in (above.parent, above.parent.parent):
        if (folder / "shared" / "caffe-golden").is_dir():
            return folder / "shared" / "caffe-golden"
    return None


FOUND = _find()
needed = pytest.mark.skipif(
    FOUND is None, reason=f"no ../shared/caffe-golden: name its place in {PLACE}"
)
FOLDER = FOUND or Path("absent")


def index(name: str) -> dict[str, Any]:
    """An index file as it is, or nothing where the folder is absent: then no test is made of it."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8")) if FOUND else {}


def compare(folder: Path, stem: str, prefix: Path, iteration: int, ending: str) -> None:
    """Compares a snapshot with what Caffe came to.

    Args:
        folder: of the case.
        stem: of Caffe's files in it.
        prefix: of ours.
        iteration: of ours.
        ending: of both, ``.h5`` or none.
    """
    found = weights.read(f"{prefix}_iter_{iteration}.caffemodel{ending}")
    wanted = weights.read(folder / "expected" / f"{stem}.caffemodel{ending}")
    for layer, blobs in wanted.items():
        for number, array in blobs.items():
            assert np.abs(found[layer][number] - array).max() <= WEIGHTS
    mine = state.read(f"{prefix}_iter_{iteration}.solverstate{ending}")
    theirs = state.read(folder / "expected" / f"{stem}.solverstate{ending}")
    assert (mine.iteration, mine.current_step) == (theirs.iteration, theirs.current_step)
    peak = max(np.abs(array).max() for array in theirs.history)
    for a, b in zip(mine.history, theirs.history, strict=True):
        assert np.abs(a - b).max() <= HISTORY * max(1e-3, peak)
