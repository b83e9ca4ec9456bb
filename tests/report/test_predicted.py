"""Predicted against measured step times as a picture."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from soonest.report.predicted import Pair, draw

PAIRS = [Pair("ddp", "alexnet", 42.8, 42.7), Pair("soonest", "alexnet", 31.5, 29.0)]


def test_errors_are_relative_to_what_was_measured():
    assert Pair("ddp", "a", 50.0, 60.0).error == pytest.approx(0.2)
    assert Pair("ddp", "a", 50.0, 45.0).error == pytest.approx(-0.1)


def test_every_step_time_leaves_a_mark(tmp_path: Path):
    both = imread(draw(PAIRS, tmp_path / "made" / "both.png"))
    moved = imread(draw([PAIRS[0], Pair("soonest", "alexnet", 31.5, 31.5)], tmp_path / "moved.png"))
    assert both.shape[1] >= 1000
    assert not np.array_equal(both, moved[: both.shape[0], : both.shape[1]])


def test_nothing_to_draw(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([], tmp_path / "none.png")
