"""The standing table as a page, made from its records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from soonest.bench.result import BASELINE, Result, Row
from soonest.bench.settings import ARMS
from soonest.bench.suite import Case
from soonest.report import bars
from soonest.writing import write_text

_HEAD = f"""\
# Benchmarks

This page is made from the records in `records/` by `soonest bench --suite`: do not edit it. Each
row is one comparison on emulated hosts: all arms are trained in turn by the same processes, on a
module that replays a model's measured compute. Times are medians in the model's own milliseconds.
The parameters of every arm have been verified on every rank.

- *synchronizing*: how often as long as computing it takes to reduce all gradients once, at the rate
  that TCP leaves of the links.
- *bound*: no schedule is faster, see `soonest.core.planner.bounds`.
- *{BASELINE}*: the best of several bucket sizes. *best other*: the fastest arm besides soonest.

Again, or only a part of it (what has a record is not run again; delete that first):

    sudo soonest bench --suite
    sudo soonest bench --suite --trace alexnet --hosts 4 --link 1x
"""


def write(results: Mapping[Case, Result], folder: Path) -> None:
    """Writes the page and its pictures.

    Args:
        results: of all cases that have a record.
        folder: the page becomes ``README.md`` in it, the pictures go to ``records/``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD]
    for hosts in sorted({case.hosts for case in results}):
        some = {case: result for case, result in results.items() if case.hosts == hosts}
        name = f"suite-{hosts}-hosts.png"
        shown = [panel(result, case.title) for case, result in some.items()]
        bars.draw(
            shown, folder / "records" / name, title=f"Time of a training step on {hosts} hosts"
        )
        parts.append(f"## {hosts} hosts\n")
        parts.append("\n".join(_table(some)) + "\n")
        parts.append(f"![Step times on {hosts} hosts](records/{name})\n")
    parts.append("\n".join(_notes(list(results.values()))))
    write_text(folder / "README.md", "\n".join(parts) + "\n")


def panel(result: Result, title: str | None = None) -> bars.Panel:
    """One comparison as a panel of a picture."""
    times = {row.arm: row.step_ms for row in result.rows() if row.arm != "local"}
    return bars.Panel(title or result.title, result.record["bound_ms"], times)


def _table(results: Mapping[Case, Result]) -> Iterator[str]:
    yield (
        f"| model | synchronizing | bound, ms | soonest, ms | × bound | {BASELINE}, ms | "
        "speed-up | best other | speed-up |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for case, result in results.items():
        rows = {row.arm: row for row in result.rows()}
        ours, tuned = rows["soonest"], rows[BASELINE]
        other = best_other(rows.values())
        yield (
            f"| {case.trace} | {case.load:g} × | {result.record['bound_ms']:.2f} | "
            f"{ours.step_ms:.2f} | {ours.over_bound:.3f} | {tuned.step_ms:.2f} | "
            f"{tuned.step_ms / ours.step_ms:.3f} | {other.arm} | "
            f"{other.step_ms / ours.step_ms:.3f} |"
        )


def best_other(rows: Iterable[Row]) -> Row:
    """The fastest arm that communicates, besides soonest."""
    return min(
        (row for row in rows if row.arm not in ("soonest", "local")), key=lambda row: row.step_ms
    )


def _notes(results: Sequence[Result]) -> Iterator[str]:
    yield "## What the arms are\n"
    yield from (f"- `{arm}`: {what}." for arm, what in ARMS.items())
    absent = {arm: why for result in results for arm, why in result.record["absent"].items()}
    if absent:
        told = "; ".join(f"{arm} ({why})" for arm, why in absent.items())
        yield f"\nNot measured here: {told}."
    warned = [(result, warning) for result in results for warning in result.warnings()]
    if warned:
        yield "\n## Warnings\n"
        yield from (f"- {result.title}: {warning}" for result, warning in warned)
    machines = {tuple(result.record["machine"].items()) for result in results}
    told = "; ".join(", ".join(f"{k} {v}" for k, v in machine) for machine in sorted(machines))
    yield f"\nMachine: {told}."
