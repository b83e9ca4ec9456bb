"""``parse_log``: the numbers of a training's log as tables, and a picture of them."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from soonest.caffe.files import read_bytes, replaced

Row = dict[str, float]

_STAMP = re.compile(r"^(?:\[\d+\] )?[IWEF](\d{4}) (\d\d:\d\d:\d\d\.\d+)")
_ITERATION = re.compile(r"Iteration (\d+)")
_RATE = re.compile(r"lr = ([-+.\deE]+)")
_OUTPUT = re.compile(r"(Train|Test) net output #\d+: (\S+) = (\S+)")
_FIXED = ("NumIters", "Seconds", "LearningRate")


@dataclass
class Parsed:
    """What a log says.

    Attributes:
        train: a row for each iteration shown: its number, seconds since the start, rate, outputs.
        test: the same for each test.
    """

    train: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)


def parse(path: str) -> Parsed:
    """Reads a log, of Caffe or of ``soonest caffe train``.

    Raises:
        ValueError: it cannot be read, or no training is in it.
    """
    found = Parsed()
    iteration, rate = -1, float("nan")
    began: datetime | None = None
    now = last = datetime(2000, 1, 1)
    for line in read_bytes(path, "a log").decode("utf-8", "replace").splitlines():
        if stamp := _STAMP.match(line):
            now = datetime.strptime("2000" + " ".join(stamp.groups()), "%Y%m%d %H:%M:%S.%f")
            if now < last - timedelta(days=300):
                now = now.replace(year=2001)  # The new year began.
            last = now
        if began is None and "Solving" in line and stamp:
            began = now
        if match := _ITERATION.search(line):
            iteration = int(match[1])
        if match := _RATE.search(line):
            rate = float(match[1])
            for rows in (found.train, found.test):
                _give_rate(rows, iteration, rate)
        match = _OUTPUT.search(line)
        if match is None or iteration < 0:
            continue
        rows = found.train if match[1] == "Train" else found.test
        if not rows or rows[-1]["NumIters"] != iteration:
            seconds = (now - began).total_seconds() if began else 0.0
            rows.append({"NumIters": iteration, "Seconds": seconds, "LearningRate": rate})
        rows[-1][match[2]] = float(match[3])
    if not found.train and not found.test:
        raise ValueError(f"{path} has no line of a training in it, such as 'Train net output #0'")
    return found


def _give_rate(rows: list[Row], iteration: int, rate: float) -> None:
    """An iteration's rate is said after its outputs, the first one after the first test."""
    for row in rows:
        if row["NumIters"] == iteration or math.isnan(row["LearningRate"]):
            row["LearningRate"] = rate


def write_tables(found: Parsed, log: str, folder: str, delimiter: str = ",") -> list[Path]:
    """Writes ``LOG.train`` and ``LOG.test``, as Caffe's own program does.

    Args:
        found: in the log.
        log: its path, after which the files are named.
        folder: to write them to.
        delimiter: between numbers.

    Raises:
        ValueError: they cannot be written.
    """
    written: list[Path] = []
    for kind, rows in (("train", found.train), ("test", found.test)):
        path = Path(folder) / f"{Path(log).name}.{kind}"
        names = list(dict.fromkeys([*_FIXED, *(name for row in rows for name in row)]))
        with replaced(path) as new, open(new, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, names, delimiter=delimiter, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        written.append(path)
    return written


def draw(found: Parsed, path: str | Path) -> None:
    """Writes a picture of everything that looks like a loss, and of everything else.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'soonest[report]'") from None
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, others = figure.subplots(2, 1, sharex=True)
    for kind, rows, style in (("train", found.train, "-"), ("test", found.test, "o--")):
        names = dict.fromkeys(name for row in rows for name in row if name not in _FIXED)
        for name in names:
            points = [(row["NumIters"], row[name]) for row in rows if name in row]
            axes = losses if "loss" in name.lower() else others
            axes.plot(*zip(*points, strict=True), style, label=f"{kind} {name}", markersize=4)
    for axes, what in ((losses, "loss"), (others, "accuracy and others")):
        axes.set_ylabel(what)
        if axes.lines:
            axes.legend()
    others.set_xlabel("iteration")
    with replaced(path) as new:
        figure.savefig(new, format=Path(path).suffix.lstrip(".") or "png", dpi=120)
