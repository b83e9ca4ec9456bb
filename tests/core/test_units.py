"""Rates and durations in words."""

import pytest

from soonest.core.units import parse_duration, parse_rate, size_text


@pytest.mark.parametrize(
    ("text", "bps"),
    [
        ("318mbit", 318e6),
        ("2.5Gbit", 2.5e9),
        ("25gbit", 25e9),
        ("64kbit", 64e3),
        ("9600bit", 9600),
        (" 1tbit ", 1e12),
        ("1000", 1000),
        ("10mbps", 80e6),
    ],
)
def test_rates(text: str, bps: float):
    assert parse_rate(text) == pytest.approx(bps)


@pytest.mark.parametrize("text", ["", "fast", "0mbit", "-1mbit", "5m", "1.2.3mbit", ".", "1mbyte"])
def test_what_is_no_rate(text: str):
    with pytest.raises(ValueError, match="is no rate: give for example"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("11us", 11e-6), ("11µs", 11e-6), ("1.5ms", 1.5e-3), ("2 s", 2), ("80NS", 8e-8), ("0", 0)],
)
def test_durations(text: str, seconds: float):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "11", "-1us", "1.2.3ms", "5m"])
def test_what_is_no_duration(text: str):
    with pytest.raises(ValueError, match="is no duration: give for example"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (1000, "1000 bytes"),
        (1024, "1 KiB"),
        (67_800, "66 KiB"),
        (256 << 10, "256 KiB"),
        (1.26 * (1 << 20), "1.3 MiB"),
        (3 << 40, "3072 GiB"),
    ],
)
def test_sizes(size_bytes: float, text: str):
    assert size_text(size_bytes) == text
