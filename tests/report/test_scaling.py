"""Predictions as a picture and as a table."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from soonest.core.forecast.predict import ARMS, Row
from soonest.report import scaling, scaling_text


def row(gpus: int) -> Row:
    step_s = {arm: 0.1 + 0.01 * place * (gpus > 1) for place, arm in enumerate(ARMS)}
    return Row(gpus, gpus, step_s, 0.1, 0.09, 0.05, float(gpus), 0.1)


@pytest.mark.parametrize("gpus", [(1, 2), (1, 3, 16), tuple(2**power for power in range(13))])
def test_it_draws(gpus: tuple[int, ...], tmp_path: Path):
    path = scaling.draw([row(n) for n in gpus], tmp_path / "made" / "p.png", title="A model")
    height, width, _ = imread(path).shape
    assert width > 2 * height > 1000


def test_one_number_is_no_curve(tmp_path: Path):
    with pytest.raises(ValueError, match="two numbers of hosts"):
        scaling.draw([row(4)], tmp_path / "p.png", title="A model")


def test_the_table():
    times, shares = "\n".join(scaling_text.table([row(1), row(16)])).split("\n\n")
    head, first, last = times.splitlines()[1:]
    assert head.split() == ["GPUs", *ARMS, "bound"]
    assert first.split() == ["1", *["100.0"] * 6]
    assert last.split() == ["16", "100.0", "110.0", "120.0", "130.0", "140.0", "100.0"]
    assert len({len(line) for line in (head, first, last)}) == 1, "columns are aligned"
    assert shares.splitlines()[-1].split()[:5] == ["16", "16.0", "100%", "14.5", "91%"]
    assert "More than 100%" not in shares


def test_more_than_all_is_explained():
    fast = Row(2, 2, dict.fromkeys(ARMS, 0.098), 0.098, 0.09, 0.05, 2.0, 0.1)
    assert list(scaling_text.table([fast]))[-1].startswith("More than 100%: updates overlap")
