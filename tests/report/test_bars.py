"""Step times as bars."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from soonest.report.bars import Panel, draw

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
