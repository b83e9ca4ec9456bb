from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from soonest import pycaffe


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """These nets are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_other_caffe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of ``soonest.caffe`` are in a package that is called caffe, too."""
    monkeypatch.setitem(sys.modules, "caffe", pycaffe)
