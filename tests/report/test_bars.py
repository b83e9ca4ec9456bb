"""Step times as bars."""

from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from soonest.report.bars import Panel, draw
from soonest.report.colours import GREY

PANEL = Panel("alexnet", 29.6, {"ddp": 44.4, "fsdp2": 80.1, "soonest": 30.9})


@pytest.mark.parametrize("number", [1, 2, 5])
def test_one_or_many(number: int, tmp_path: Path):
    path = draw([PANEL] * number, tmp_path / "made" / "bars.png")
    height, width, _ = imread(path).shape
    assert width >= 1000
    rows = -(-number // 3)
    assert height == pytest.approx(160 * (0.75 + rows * (0.42 + 3 * 0.26 + 0.42)), abs=4)


def test_nothing_to_draw(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([], tmp_path / "bars.png")


def test_what_stands_at_each_bar(tmp_path: Path, figures: list[Figure]):
    draw([PANEL], tmp_path / "bars.png", title="All of it")
    (axes,) = figures[0].axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [bar.get_width() for bar in bars] == [44.4, 80.1, 30.9]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ddp", "fsdp2", "soonest"]
    shown = [text.get_text() for text in axes.texts]
    # 44.4 / 29.6 = 1.5, 80.1 / 29.6 = 2.706, 30.9 / 29.6 = 1.044
    assert shown == ["bound", "44.4 ms · 1.50×", "80.1 ms · 2.71×", "30.9 ms · 1.04×"]
    assert axes.get_title(loc="left") == "alexnet"
    assert [text.get_text() for text in figures[0].texts] == ["All of it"]


def test_the_bound_is_where_it_is(tmp_path: Path, figures: list[Figure]):
    draw([PANEL], tmp_path / "bars.png")
    (axes,) = figures[0].axes
    assert [set(line.get_xdata()) for line in axes.lines] == [{29.6}]  # type: ignore[arg-type]


@pytest.mark.parametrize("stands_out", ["soonest", "ddp"])
def test_one_bar_stands_out(stands_out: str, tmp_path: Path, figures: list[Figure]):
    panel = Panel("alexnet", 29.6, dict(PANEL.step_ms), highlight=stands_out)
    draw([panel], tmp_path / "bars.png")
    (axes,) = figures[0].axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    labels = axes.get_yticklabels()
    grey = [to_rgb(bar.get_facecolor()) == pytest.approx(GREY) for bar in bars]
    assert grey == [arm != stands_out for arm in PANEL.step_ms]
    assert [label.get_fontweight() == "bold" for label in labels] == [not one for one in grey]
