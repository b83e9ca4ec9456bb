"""Cost by size as curves."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from soonest.report.curves import Chart, Run, draw, spread

CHART = Chart(
    "Costs",
    {
        "allreduce": [(1024, 4e-3), (4096, 5e-3), (16384, 9e-3)],
        "exchange": [(1024, 2e-3), (4096, 4e-3), (16384, 3e-2)],
        "gather": [(1024, 3e-3), (4096, 6e-3)],
    },
    [Run("exchange", 1024, 5000, "2 ×"), Run("allreduce", 5000, 16384, "own")],
    "allreduce",
    dashed=("gather",),
    why_dashed="for show",
)


def test_it_draws(tmp_path: Path):
    path = draw(CHART, tmp_path / "made" / "curves.png")
    height, width, _ = imread(path).shape
    assert width > height > 500


def test_nothing_to_draw(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(Chart("Costs", {}, [], "allreduce"), tmp_path / "curves.png")


@given(places=st.lists(st.floats(0, 1000), max_size=8), least=st.floats(1, 50))
def test_names_are_moved_apart_and_keep_their_order(places: list[float], least: float):
    moved = spread(places, least)
    order = sorted(range(len(places)), key=places.__getitem__)
    assert all(moved[b] - moved[a] > least - 1e-6 for a, b in pairwise(order))
    assert sum(moved) == pytest.approx(sum(places), abs=1e-6)


def test_names_with_room_stay():
    assert spread([100.0, 10.0, 60.0], 20.0) == [100.0, 10.0, 60.0]
    assert spread([10.0, 10.0], 20.0) == [0.0, 20.0]
