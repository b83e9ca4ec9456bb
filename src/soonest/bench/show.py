"""Shows comparisons: their progress, and what came of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from soonest.bench.progress import Work
from soonest.bench.result import BASELINE, Result
from soonest.bench.settings import KNOWN

_NARROWEST = 100
"""Where nobody looks at a terminal, tables need not be cut to its width."""


class Screen:
    """A terminal with a moving bar if there is one, plain lines otherwise."""

    def __init__(self) -> None:
        console = Console(highlight=False, soft_wrap=True)
        self._console = console
        if not console.is_terminal:
            console.width = max(console.width, _NARROWEST)
        self._bar: Progress | None = None
        self._task: Any = None

    @contextmanager
    def work(self) -> Iterator[None]:
        """The time of one piece of work."""
        if not self._console.is_terminal:
            yield
            return
        columns = (BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task("starting", total=1.0)
            yield

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def show(self, what: RenderableType) -> None:
        """Shows a table or the like."""
        self._console.print(what)

    def watch(self, now: Work) -> None:
        """Shows that the work has got further."""
        left = "" if now.left_s is None else f", {_duration(now.left_s)} left"
        if self._console.is_terminal:
            assert self._bar is not None
            self._bar.update(self._task, completed=now.share, description=now.doing + left)
        else:
            self.say(f"{now.share:4.0%}  {now.doing}{left}")

    def result(self, result: Result) -> None:
        """Shows what came of a comparison."""
        self.say("")
        self.show(_table(result))
        for line in _remarks(result):
            self.say(line)


def _table(result: Result) -> Table:
    table = Table(title=result.title, title_justify="left", title_style="bold")
    table.add_column("arm", no_wrap=True)
    table.add_column("step, ms", justify="right")
    table.add_column("× bound", justify="right")
    table.add_column(f"speed, {BASELINE} = 1", justify="right")
    table.add_column("communication hidden", justify="right")
    table.add_column("what it is", style="dim")
    best = min(
        (row for row in result.rows() if row.arm != "local"),
        key=lambda row: row.step_ms,
        default=None,
    )
    for row in result.rows():
        table.add_row(
            row.arm,
            f"{row.step_ms:.2f}",
            f"{row.over_bound:.3f}",
            "" if row.speedup is None else f"{row.speedup:.3f}",
            "" if row.hidden is None else f"{row.hidden:.0%}",
            KNOWN.get(row.arm, "your own"),
            style="bold green" if row == best else None,
        )
    for arm in result.record["absent"]:
        table.add_row(arm, "absent", "", "", "", KNOWN[arm], style="dim")
    table.add_section()
    table.add_row("bound", f"{result.record['bound_ms']:.2f}", "1", "", "", "no schedule beats it")
    return table


def _remarks(result: Result) -> Iterator[str]:
    record = result.record
    yield (
        f"In the model's own time: computing {record['compute_ms']:.2f} ms, synchronizing "
        f"{record['communication_ms']:.2f} ms. Here all took {record['slow_motion']:g} times as "
        f"long, tensors and buckets were 1/{record['shrink']:g} of their size, and links "
        f"{record['shaped_link_bps'] / 1e6:.3g} Mbit/s."
    )
    sweep = record["arms"].get(BASELINE, {}).get("sweep_ms")
    if sweep:
        told = ", ".join(f"{bucket} {ms:.2f}" for bucket, ms in sweep.items())
        chosen = record["arms"][BASELINE]["bucket"]
        yield f"{BASELINE} has buckets of {chosen}; short tries took, in ms: {told}."
    for name, arm in record["arms"].items():
        if "methods" in arm:
            told = ", ".join(f"{count} by {method}" for method, count in arm["methods"].items())
            yield f"Buckets of {name}: {told}."
    yield from (f"{arm} is absent: {why}." for arm, why in record["absent"].items())
    yield "The parameters of all arms are right, and the same on all ranks."
    yield from (f"WARNING: {warning}" for warning in result.warnings())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
