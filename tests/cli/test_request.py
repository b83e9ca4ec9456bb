"""What words of a command line stand for."""

import argparse
import math
from pathlib import Path

import pytest

from soonest.cli.request import at_least, duration, factor, new_file, rate


def test_what_is_understood(tmp_path: Path):
    assert rate("200mbit") == 200e6
    assert duration("11us") == pytest.approx(11e-6)
    assert (at_least(1)("1"), at_least(0)("7")) == (1, 7)
    assert factor("0.5") == 0.5
    assert new_file(str(tmp_path / "x")) == tmp_path / "x"


@pytest.mark.parametrize(
    ("read", "word", "why"),
    [
        (at_least(1), "0", "0 is too few: give 1 or more"),
        (at_least(2), "x", "not a whole number"),
        (factor, "0", "above zero"),
        (factor, "-1", "above zero"),
        (factor, str(math.inf), "out of range"),
        (factor, "nan", "out of range"),
        (factor, "x", "not a number"),
        (rate, "7 apples", "no rate"),
        (duration, "7 apples", "no duration"),
        (new_file, "/", "is a folder"),
        (new_file, "/no/such/folder/x", "no folder"),
    ],
)
def test_what_is_refused(read, word: str, why: str):
    with pytest.raises(argparse.ArgumentTypeError, match=why):
        read(word)
