"""The picture is a PNG on which everything can be read."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from soonest.core.cost import Network
from soonest.core.planner.planner import flats_of, make_plan
from soonest.core.simulator.simulate import simulate
from soonest.core.timeline import Timeline
from soonest.core.trace import Trace
from soonest.report.picture import draw, figure_of

NOTE = (
    "rank 12 (host node-0412.cluster.example.org, process 281731) is late since step 121210: its "
    "link carries 312 Mbit/s, those of the others 940 Mbit/s; this costs up to 84.3 ms of a step "
    "of 190 ms"
)


def simulated(model: str) -> Timeline:
    trace = Trace.load(model)
    network = Network.ideal(4, 8 * trace.total_bytes / (trace.forward_s + trace.backward_s))
    plan = make_plan(trace, flats_of(trace), network, ranks=4)
    return simulate(trace, plan, network)


def texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    axes = figure.axes[0]
    found = [*axes.texts, axes.xaxis.label, *axes.get_xticklabels()]
    return [*found, *figure.texts, *figure.legends[0].get_texts()]


def test_the_file_is_a_png_of_a_sensible_size(tmp_path: Path, plain: Timeline):
    path = draw([plain], tmp_path / "new" / "step.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (1200 <= width <= 2400, 400 <= height <= 800) == (True, True)
    assert len(content) < 500_000


def test_every_timeline_makes_it_higher(plain: Timeline, overlapped: Timeline):
    heights = [
        figure_of(timelines, title="").get_figheight()
        for timelines in ([plain], [plain, overlapped], [plain, overlapped, plain])
    ]
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0])
    assert heights[1] > heights[0] + 1


@pytest.mark.parametrize("model", [*Trace.shipped(), None])
def test_every_text_is_inside_the_picture_and_over_no_other(
    model: str | None, plain: Timeline, overlapped: Timeline
):
    noted = [replace(plain, note=NOTE), replace(overlapped, note=NOTE)]
    timelines = noted if model is None else [simulated(model)] * 2
    figure = figure_of(timelines, title="A title that says what this is")
    boxes = {text: text.get_window_extent() for text in texts(figure) if text.get_text().strip()}
    assert len(boxes) > 10
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
        others = [other for other in boxes if other is not text and boxes[other].overlaps(box)]
        assert not others, (text, others)


def test_it_says_how_long_how_much_is_hidden_and_how_much_faster(
    plain: Timeline, overlapped: Timeline
):
    figure = figure_of([plain, overlapped], title="Both")
    shown = "\n".join(text.get_text() for text in texts(figure))
    for part in ("Both", "plain", "overlapped", "1000 ms", "600 ms", "1.67 times as fast"):
        assert part in shown
    assert "0% of the sending" in shown
    assert "50% of the sending" in shown
    assert "waits for the network" in shown


def test_a_layer_has_one_colour_in_the_forward_pass_and_on_the_network(overlapped: Timeline):
    axes = figure_of([overlapped], title="").axes[0]

    def colour_at(x_ms: float, y: float) -> object:
        boxes = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_fill()]
        found = [
            p.get_facecolor()
            for p in boxes
            if p.get_x() <= x_ms <= p.get_x() + p.get_width()
            and p.get_y() <= y <= p.get_y() + p.get_height()
            and p.get_facecolor()[3] > 0
        ]
        return found[-1]

    compute, network = 0.7, 1.2
    assert colour_at(350, compute) == colour_at(250, network)  # layer a
    assert colour_at(550, compute) == colour_at(450, network)  # layer b
    assert colour_at(350, compute) != colour_at(550, compute)
    assert colour_at(150, compute) != colour_at(350, compute)  # paler in the backward pass


def test_names_are_shown_where_they_fit(plain: Timeline):
    shown = [text.get_text() for text in figure_of([plain], title="").axes[0].texts]
    assert "2 layers" in shown
    assert {"a", "b"} <= set(shown)


def test_an_empty_step_can_be_drawn(tmp_path: Path):
    assert draw([Timeline("nothing", 0.5, ())], tmp_path / "x.png").stat().st_size


def test_nothing_cannot_be_drawn(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one"):
        draw([], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_it_leaves_pyplot_alone(plain: Timeline):
    script = "import sys, soonest.report.picture; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def end_texts(figure: Figure, x_ms: float) -> str:
    """What stands at the end of a step."""
    found = [text for text in figure.axes[0].texts if text.get_position()[0] == x_ms]
    return " | ".join(text.get_text().replace("\n", " ") for text in found)


def test_a_step_ends_where_it_ends_with_its_own_figures(plain: Timeline, overlapped: Timeline):
    quick = replace(overlapped, spans=tuple(s for s in overlapped.spans if s.kind != "wait"))
    figure = figure_of([plain, quick], title="")
    assert end_texts(figure, 1000) == "1000 ms | 0% of the sending hidden behind compute"
    assert end_texts(figure, 600) == (
        "600 ms | 1.67 times as fast 100% of the sending hidden behind compute"
    )


def test_names_stand_on_what_they_name(plain: Timeline):
    """Layer a is computed from 100 to 200 ms and from 700 to 800, b around that."""
    axes = figure_of([plain], title="").axes[0]
    at = {name: [t.get_position()[0] for t in axes.texts if t.get_text() == name] for name in "ab"}
    assert at == {"a": [150, 750], "b": [50, 900]}
    assert [t.get_position()[0] for t in axes.texts if t.get_text() == "2 layers"] == [400]
    assert [t.get_position()[0] for t in axes.texts if t.get_text() == "forward"] == [850]
