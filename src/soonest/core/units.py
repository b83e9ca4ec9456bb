"""Rates, durations and sizes as people write them."""

from __future__ import annotations

import re

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def parse_rate(text: str) -> float:
    """Bits per second of ``318mbit``, ``2.5Gbit`` or ``25gbit``.

    As in ``tc``, a bare number is bits per second, and ``mbps`` is mega*bytes* per second.
    """
    match = re.fullmatch(r"([\d.]+)([kmgt]?)(bit|bps)?", text.strip().lower())
    number = _number(match[1]) if match else None
    if match is None or not number or (match[2] and not match[3]):
        raise ValueError(f"{text!r} is no rate: give for example 318mbit, 2.5gbit or 100kbit")
    return number * _PREFIXES[match[2]] * (8 if match[3] == "bps" else 1)


def parse_duration(text: str) -> float:
    """Seconds of ``11us``, ``1.5ms``, ``2s`` or ``0``."""
    match = re.fullmatch(r"([\d.]+)\s*(ns|us|µs|ms|s)?", text.strip().lower())
    number = _number(match[1]) if match else None
    if match is None or number is None or (number and not match[2]):
        raise ValueError(f"{text!r} is no duration: give for example 11us, 1.5ms or 2s")
    return number * _SECONDS[match[2] or "s"]


def rate_text(bps: float) -> str:
    """A rate as people say it, such as ``25 Gbit/s``."""
    for unit, size in (("Tbit/s", 1e12), ("Gbit/s", 1e9)):
        if bps >= size:
            return f"{bps / size:.3g} {unit}"
    return f"{bps / 1e6:.3g} Mbit/s"


def size_text(size_bytes: float) -> str:
    """A size such as ``16 KiB``, to two or three digits."""
    unit = "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if size_bytes >= 1024:
            size_bytes, unit = size_bytes / 1024, larger
    return f"{size_bytes:.0f} {unit}" if size_bytes >= 100 else f"{size_bytes:.2g} {unit}"


def _number(digits: str) -> float | None:
    try:
        return float(digits)
    except ValueError:
        return None
