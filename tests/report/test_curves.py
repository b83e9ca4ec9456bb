"""Cost by size as curves."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from soonest.report.colours import INK
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
    assert spread([50.0, 10.0, 10.0], 20.0) == [50.0, 0.0, 20.0]


def lines(figure: Figure, width: float) -> list[list[tuple[float, float]]]:
    """The points of all lines of a width on the first axes."""
    return [
        [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]  # type: ignore[arg-type]
        for line in figure.axes[0].lines
        if line.get_linewidth() == width
    ]


def test_each_method_has_its_curve_and_the_cheapest_is_bold(tmp_path: Path, figures: list[Figure]):
    draw(CHART, tmp_path / "curves.png")
    assert lines(figures[0], 1.2) == [list(points) for points in CHART.points.values()]
    exchange, allreduce = lines(figures[0], 4.2)
    assert exchange[:2] == [(1024, 2e-3), (4096, 4e-3)]
    assert allreduce[1:] == [(16384, 9e-3)]
    assert (exchange[-1][0], allreduce[0][0]) == (5000, 5000), "they meet where the choice changes"
    assert 4e-3 < exchange[-1][1] < 3e-2
    assert 5e-3 < allreduce[0][1] < 9e-3


def test_names_stand_at_their_curves(tmp_path: Path, figures: list[Figure]):
    draw(CHART, tmp_path / "curves.png")
    axes = figures[0].axes[0]
    ends = [text for text in axes.texts if text.get_text() in CHART.points][-3:]
    heights = {text.get_text(): float(text.get_position()[1]) for text in ends}
    assert sorted(heights, key=heights.__getitem__) == ["gather", "allreduce", "exchange"]
    (baseline,) = [text for text in ends if text.get_text() == "allreduce"]
    assert to_rgb(baseline.get_color()) == pytest.approx(INK)  # type: ignore[arg-type]
    shown = [text.get_text() for text in (*axes.texts, *figures[0].texts)]
    assert {"2 ×", "own", "4.9 KiB", "Costs"} <= set(shown)
    assert "Dashed: for show." in shown[-1]
