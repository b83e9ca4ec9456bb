"""Where the results of real Caffe are that the tests compare with, read in place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

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
