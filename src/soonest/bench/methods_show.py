"""Shows what methods of reducing cost: a table, what to see in it, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

from rich import box
from rich.table import Table

from soonest.bench.methods import (
    BASELINE,
    DROPPED,
    ITEM_BYTES,
    TYPE,
    Choice,
    Costs,
)
from soonest.core.plan import shards
from soonest.core.units import size_text


def table(costs: Costs) -> Table:
    """One row per size and method, with the columns of nccl-tests."""
    shown = Table(
        title=costs.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for head in ("size,\nbytes", "count,\nelements"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("type", no_wrap=True)
    shown.add_column("method", no_wrap=True)
    for head in ("time,\nms", "algbw,\nMB/s", "busbw,\nMB/s", f"× {BASELINE}"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for choice in costs.chosen():
        _add_size(shown, costs, choice)
    return shown


def _add_size(shown: Table, costs: Costs, choice: Choice) -> None:
    size = choice.size_bytes
    what = (str(size), str(size // ITEM_BYTES), TYPE)
    base_s = costs.time_s(size, BASELINE)
    assert base_s is not None
    for method in costs.methods:
        time_s = costs.time_s(size, method)
        if time_s is None:
            shown.add_row(*what, method, *4 * ("-",), style="dim")
            continue
        rates = (size / time_s, costs.busbw(size, time_s))
        shown.add_row(
            *what,
            method,
            f"{time_s * 1e3:.2f}",
            *(f"{bytes_per_s / 1e6:.2f}" for bytes_per_s in rates),
            f"{base_s / time_s:.2f}",
            "cheapest" if method == choice.method else "",
            style="bold green" if method == choice.method else "dim" if shards(method) else None,
        )
    shown.add_section()


def remarks(costs: Costs) -> Iterator[str]:
    """What to see in the table, one sentence a line."""
    crossed = [f"about {size_text(at.size_bytes)}" for at in costs.crossovers()]
    for run, start, stop in zip(_runs(costs), ["", *crossed], [*crossed, ""], strict=True):
        ends = [f"from {start}"] * bool(start) + [f"up to {stop}"] * bool(stop)
        gain = "the backend's own" if _is_base(run) else f"{_gain(run)} times as fast as {BASELINE}"
        yield f"Cheapest {' '.join(ends) or 'at every size'}: {run[0].method}, {gain}."
    given_up = [m for m in costs.methods if m not in costs.times_s[costs.sizes[-1]]]
    if given_up:
        yield (
            f"A dash: {', '.join(given_up)} took more than {DROPPED:g} times as long as the "
            "cheapest with smaller tensors, and was not measured any further."
        )
    if sharding := [method for method in costs.methods if shards(method)]:
        yield (
            f"{' and '.join(sharding)} are taken on demand only, for they leave each rank a part "
            "of the parameters to update."
        )
    yield (
        f"Medians of the slowest rank's times, {costs.seconds:.0f} s in all; busbw as for an "
        "all-reduce, whatever the method. Every sum was right."
    )
    if busy := costs.busy():
        where = ", ".join(map(size_text, busy)) if len(busy) < len(costs.sizes) else "every size"
        yield (
            f"WARNING: The cores, not the links, may have limited this at {where}: give a lower "
            "--link or fewer --hosts, and let nothing else run."
        )


def draw(costs: Costs, path: Path) -> Path:
    """Draws the costs as a PNG; returns its path.

    Raises:
        ImportError: there is no matplotlib.
    """
    from soonest.report import curves

    points = {
        method: [(size, s) for size in costs.sizes if (s := costs.time_s(size, method))]
        for method in costs.methods
    }
    crossed = [at.size_bytes for at in costs.crossovers()]
    borders = pairwise((costs.sizes[0], *crossed, costs.sizes[-1]))
    runs = [
        curves.Run(run[0].method, *ends, "backend's own" if _is_base(run) else f"{_gain(run)} ×")
        for run, ends in zip(_runs(costs), borders, strict=True)
    ]
    dashed = [method for method in costs.methods if shards(method)]
    why = "taken on demand only, for it leaves each rank a part of the parameters to update"
    return curves.draw(curves.Chart(costs.title, points, runs, BASELINE, dashed, why), path)


def _runs(costs: Costs) -> list[list[Choice]]:
    """Neighbouring sizes with the same choice."""
    return [list(run) for _, run in groupby(costs.chosen(), key=lambda choice: choice.method)]


def _is_base(run: list[Choice]) -> bool:
    return run[0].method == BASELINE


def _gain(run: list[Choice]) -> str:
    """How many times as fast as the baseline."""
    least, most = (f"{f(choice.over_allreduce for choice in run):.2f}" for f in (min, max))
    return least if least == most else f"{least} to {most}"
