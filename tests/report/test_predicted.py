"""Predicted against measured step times as a picture."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
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


def test_measured_is_to_the_right_and_predicted_above(tmp_path: Path, figures: list[Figure]):
    draw(PAIRS, tmp_path / "p.png")
    above, below = figures[0].axes

    def points(axes) -> list[list[float]]:
        return [
            [round(float(v), 6) for v in place]
            for marks in axes.collections
            for place in marks.get_offsets()
            if len(marks.get_offsets())
            and marks.get_paths()[0].vertices.shape[0] > 4
            and list(place) != [0.0, 0.0]
        ]

    assert points(above) == [[42.8, 42.7], [31.5, 29.0]]
    # 42.7 / 42.8 is 0.23 % too short, 29 / 31.5 is 7.94 %.
    assert points(below) == [
        [42.8, pytest.approx(-0.2336, abs=1e-3)], [31.5, pytest.approx(-7.9365, abs=1e-3)],
    ]  # fmt: skip
    assert "predicted" in above.get_ylabel()
    assert "measured" in below.get_xlabel()
    legend = above.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["ddp", "soonest"]
    assert "2 steps of 1 comparisons" in figures[0].texts[1].get_text()
