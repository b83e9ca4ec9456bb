"""Predictions as a picture and as a table."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
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


def curves(axes: Axes) -> dict[str, list[float]]:
    """By name, the values of what is drawn over 1, 2 and 4 GPUs."""
    by_colour = {to_rgb(colour): arm for arm, colour in scaling._COLOURS.items()}
    found: dict[str, list[float]] = {}
    for line in axes.lines:
        x, y = list(line.get_xdata()), list(line.get_ydata())  # type: ignore[arg-type]
        if x == [1, 2, 4]:
            name = "bound" if line.is_dashed() else by_colour[to_rgb(line.get_color())]
            found[name] = [round(float(value), 6) for value in y]
    return found


def test_speed_up_is_drawn_on_the_left_and_efficiency_on_the_right(
    tmp_path: Path, figures: list[Figure]
):
    """Steps of 100 ms on one GPU, and of 100, 110, ... by arm on more; the bound is always 100."""
    scaling.draw([row(n) for n in (1, 2, 4)], tmp_path / "p.png", title="A model")
    left, right = figures[0].axes
    assert "Speed-up" in left.get_title(loc="left")
    assert "Efficiency" in right.get_title(loc="left")
    speed, share = curves(left), curves(right)
    assert set(speed) == set(share) == {*ARMS, "bound"}
    for place, arm in enumerate(ARMS):
        factor = 1 / (1 + 0.1 * place)
        assert speed[arm] == pytest.approx([1, 2 * factor, 4 * factor], abs=1e-5)
        assert share[arm] == pytest.approx([1, factor, factor], abs=1e-5)
    assert (speed["bound"], share["bound"]) == ([1, 2, 4], [1, 1, 1])


def test_the_names_stand_at_the_ends_of_their_curves(tmp_path: Path, figures: list[Figure]):
    scaling.draw([row(n) for n in (1, 2, 4)], tmp_path / "p.png", title="A model")
    texts = figures[0].axes[1].texts
    heights = {text.get_text(): text.get_position()[1] for text in texts}
    assert sorted(heights, key=lambda arm: -heights[arm])[-1] == list(ARMS)[-1], "the slowest"
    for text in texts[:-1]:
        assert to_rgb(text.get_color()) == to_rgb(  # type: ignore[arg-type]
            scaling._COLOURS.get(text.get_text(), scaling.INK)
        )


def test_what_no_schedule_can_reach_is_grey(tmp_path: Path, figures: list[Figure]):
    scaling.draw([row(n) for n in (1, 2, 4)], tmp_path / "p.png", title="A model")
    left, right = figures[0].axes
    for axes, bound in ((left, [1, 2, 4]), (right, [1, 1, 1])):
        (area,) = axes.collections
        corners = area.get_paths()[0].vertices
        top = axes.get_ylim()[1]
        assert {round(float(y), 6) for _, y in corners} == {*bound, round(top, 6)}
        assert top > max(bound)
