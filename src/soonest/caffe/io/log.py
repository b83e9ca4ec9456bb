"""Log lines as Caffe prints them: people have scripts that read them."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from soonest.caffe.net.net import Net

Say = Callable[[str], None]
LEVELS = ("INFO", "WARNING", "ERROR", "FATAL")
INFO, WARNING, ERROR, FATAL = range(4)


@dataclass
class Logger:
    """Where lines go, as the flags of Google's logger say, which Caffe uses.

    Attributes:
        stderr_from: the lowest level that goes to stderr.
        level_from: the lowest that goes anywhere.
        folder: for files, one a level, with what is of that level or above; without it there are
            none.
    """

    stderr_from: int = INFO
    level_from: int = INFO
    folder: str = ""
    _files: dict[int, IO[str]] = field(default_factory=dict)

    def write(self, level: int, message: str) -> None:
        """Writes a line.

        Its prefix says how grave it is, the date, the process, and the place in the code.
        """
        if level < self.level_from:
            return
        now = datetime.now()
        stamp = now.strftime("%m%d %H:%M:%S.%f")
        line = f"{LEVELS[level][0]}{stamp} {os.getpid():5d} caffe:0] {message}\n"
        if level >= self.stderr_from:
            sys.stderr.write(line)
            sys.stderr.flush()
        if self.folder:
            for lower in range(level + 1):
                if lower not in self._files:
                    self._files[lower] = self._begun(lower, now)
                self._files[lower].write(line)
                self._files[lower].flush()

    def _begun(self, level: int, now: datetime) -> IO[str]:
        """A new file, and a link to it that is always named the same."""
        host, name = socket.gethostname(), LEVELS[level]
        ending = f"{now:%Y%m%d-%H%M%S}.{os.getpid()}"
        path = Path(self.folder, f"caffe.{host}.{getpass.getuser()}.log.{name}.{ending}")
        try:
            file = path.open("w", encoding="utf-8")
            link = Path(self.folder, f"caffe.{name}")
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
        except OSError as error:
            raise ValueError(f"cannot write a log into {self.folder!r}: {error}") from None
        file.write(
            f"Log file created at: {now:%Y/%m/%d %H:%M:%S}\nRunning on machine: {host}\n"
            "Log line format: [IWEF]mmdd hh:mm:ss.uuuuuu threadid file:line] msg\n"
        )
        return file

    def close(self) -> None:
        """Closes its files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


_logger = Logger()


@contextmanager
def to(logger: Logger) -> Iterator[None]:
    """Lets lines go to a logger while inside."""
    global _logger
    before, _logger = _logger, logger
    try:
        yield
    finally:
        _logger = before
        logger.close()


def to_stderr(message: str) -> None:
    """Says something, unless a logger says otherwise to stderr."""
    _logger.write(INFO, message)


def warning(message: str) -> None:
    """Says what may be wrong."""
    _logger.write(WARNING, message)


def silent(message: str) -> None:
    """Prints nothing: what ranks other than the first do."""


def outputs(kind: str, net: Net, values: dict[str, torch.Tensor]) -> list[str]:
    """A line for each number that a net gives.

    Args:
        kind: ``Train`` or ``Test``.
        net: which gave them.
        values: by name of the blob.
    """
    lines: list[str] = []
    for name, blob in values.items():
        weight = net.loss_weight(name)
        for value in blob.detach().flatten().tolist():
            loss = f" (* {weight:g} = {weight * value:g} loss)" if weight else ""
            lines.append(f"    {kind} net output #{len(lines)}: {name} = {value:g}{loss}")
    return lines


class Smoothed:
    """The mean of the last losses, as Caffe computes it.

    Args:
        over: how many; ``average_loss`` of the solver.
    """

    def __init__(self, over: int) -> None:
        self._over = over
        self._losses: list[float] = []
        self._seen = 0
        self.value = 0.0

    def add(self, loss: float) -> None:
        """Takes in the loss of an iteration."""
        if len(self._losses) < self._over:
            self._losses.append(loss)
            count = len(self._losses)
            self.value = (self.value * (count - 1) + loss) / count
        else:
            place = self._seen % self._over
            self.value += (loss - self._losses[place]) / self._over
            self._losses[place] = loss
        self._seen += 1


class Pace:
    """How fast iterations go.

    Args:
        iteration: the first.
    """

    def __init__(self, iteration: int) -> None:
        self._last = iteration
        self._began_s = time.perf_counter()

    def lap(self, iteration: int) -> tuple[float, float]:
        """Iterations a second since the last lap, and how many seconds that was."""
        now_s = time.perf_counter()
        lapse_s = now_s - self._began_s
        rate = (iteration - self._last) / (lapse_s or 1.0)
        self._last, self._began_s = iteration, now_s
        return rate, lapse_s
