"""A prediction as a table of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from soonest.core.forecast.predict import Row

_GAP = "  "
_MORE = 1.005


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Step times, and what they mean as speed-up and efficiency: one line per number of GPUs.

    Args:
        rows: at least one, all with the same ways of training.
    """
    arms = list(rows[0].step_s)
    heads = ["GPUs", *arms, "bound"]
    lines = [heads, *([str(row.gpus), *_steps(row)] for row in rows)]
    times = _aligned(lines)
    shares = _aligned([heads, *([str(row.gpus), *_shares(row)] for row in rows)])
    yield "Time of a step, ms"
    yield from times
    yield ""
    yield "Speed-up over one GPU alone, and efficiency, which is that per GPU"
    yield from shares
    most = max(row.efficiency(s) for row in rows for s in (*row.step_s.values(), row.bound_s))
    if most >= _MORE:
        yield "More than 100%: updates overlap the forward pass, unlike on one GPU alone."


def _steps(row: Row) -> list[str]:
    return [_ms(step_s) for step_s in (*row.step_s.values(), row.bound_s)]


def _shares(row: Row) -> list[str]:
    return [
        f"{_times(row.speedup(step_s))} {row.efficiency(step_s):>5.0%}"
        for step_s in (*row.step_s.values(), row.bound_s)
    ]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        _GAP.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]


def _ms(step_s: float) -> str:
    ms = step_s * 1e3
    return f"{ms:.0f}" if ms >= 1e4 else f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}"


def _times(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
