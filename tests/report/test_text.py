"""Bars of text show the same as the picture."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from soonest.core.timeline import Span, Timeline
from soonest.report.text import bars, coloured

KNOWN = """\
plain: 1000 ms, 0% of the sending hidden behind compute
  compute bbbbaaaa░░░░░░░░░░░░░░░░    AAAABBBBBBBB│
  network         a--------------b                │
  update                          ████            │
overlapped: 600 ms, 1.67 times as fast, 50% of the sending hidden behind compute
  compute bbbbaaaa░░░░AAAA░░░░BBBB│
  network     bbbbaaaabbbbbbbb    │
  update              █           │
"""


def test_a_known_step(plain: Timeline, overlapped: Timeline):
    shown = bars([plain, overlapped], width=51)
    bodies = [line.rstrip() for line in KNOWN.splitlines()]
    assert shown.splitlines()[: len(bodies)] == [body[:51].rstrip() for body in bodies]


@pytest.mark.parametrize("width", [21, 40, 80, 100, 200])
def test_no_line_is_wider_than_asked(plain: Timeline, overlapped: Timeline, width: int):
    lines = bars([plain, overlapped], width=width).splitlines()
    assert max(len(line) for line in lines) <= width
    ends = [line.index("│") for line in lines if line.startswith("  ")]
    assert ends[:3] == [width - 1] * 3
    assert set(ends[3:]) == {10 + round(0.6 * (width - 11))}


def test_the_explanation_is_there_once(plain: Timeline, overlapped: Timeline):
    shown = bars([plain, overlapped, plain]).replace("\n", " ")
    assert shown.count("a is needed first") == 1


def test_the_coloured_bars_say_the_same(plain: Timeline, overlapped: Timeline):
    out = io.StringIO()
    Console(file=out, width=100).print(coloured([plain, overlapped], width=100))
    shown = [line.rstrip() for line in out.getvalue().splitlines()]
    assert shown == bars([plain, overlapped], width=100).splitlines()


def test_a_layer_has_one_colour(overlapped: Timeline):
    out = io.StringIO()
    text = coloured([overlapped], width=71)
    Console(file=out, width=100, force_terminal=True, color_system="truecolor").print(text)
    compute, network = out.getvalue().splitlines()[1:3]

    def colours(line: str, letter: str) -> set[str]:
        return {part.split("m")[0] for part in line.split("\x1b[") if part.endswith(f"m{letter}")}

    for letter in "ab":
        assert len(colours(network, letter)) == 1
        assert colours(compute, letter.upper()) == colours(network, letter)
        assert colours(compute, letter) != colours(network, letter)


def test_many_layers_share_letters_in_order():
    spans = tuple(Span("compute", "forward", f"layer{i}", i, i + 1) for i in range(80))
    line = bars([Timeline("many", 80.0, spans)], width=91).splitlines()[1]
    letters = line.split()[1].rstrip("│")
    assert len(letters) == 80
    assert list(letters) == sorted(letters)
    assert (letters[0], letters[-1]) == ("A", "Z")


def test_too_narrow_or_nothing_is_refused(plain: Timeline):
    with pytest.raises(ValueError, match="at least 21"):
        bars([plain], width=20)
    with pytest.raises(ValueError, match="at least one"):
        bars([])


def test_a_note_stands_above_the_bars_and_is_no_wider(plain: Timeline):
    said = "rank 2 is late since step 21: its compute takes 150 ms a step, that of the others 100"
    lines = bars([replace(plain, note=said)], width=40).splitlines()
    assert lines[0].startswith("plain: 1000 ms")
    noted = lines[1 : next(i for i, line in enumerate(lines) if line.endswith("│"))]
    assert " ".join(line.strip() for line in noted) == said
    assert max(map(len, noted)) <= 40


def test_a_cell_shows_what_takes_most_of_it():
    """Ten cells of 10 ms: b has 7 of the second one and 8 of the third, of which c has 2."""
    spans = (
        Span("compute", "forward", "a", 0, 0.013),
        Span("compute", "forward", "b", 0.013, 0.028),
        Span("compute", "forward", "c", 0.028, 0.1),
    )
    line = bars([Timeline("x", 0.1, spans)], width=21).splitlines()[1]
    assert line.split()[1] == "ABBCCCCCCC│"


def test_what_is_hidden_is_told(overlapped: Timeline):
    quick = replace(overlapped, spans=tuple(s for s in overlapped.spans if s.kind != "wait"))
    assert bars([quick]).startswith("overlapped: 600 ms, 100% of the sending hidden behind compute")
