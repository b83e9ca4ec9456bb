"""Which labs run on this machine, so that another process can change their links.

Every running lab has a file in a common folder and holds a lock on it. The kernel lets go of that
lock however the lab's process ends: a file that nobody holds is what a killed lab left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import IO

from soonest.lab.links import Links
from soonest.lab.namespaces import path_of


@dataclass(frozen=True)
class RunningLab:
    """What is known of a running lab.

    Args:
        id: its number, while it runs.
        pid: the process that made it.
        files: that process's open files of the namespaces: the hosts', then the switch's.
        link_bps: rate of its links when it was made.
        uplinks_bps: rate at which each host sends, likewise.
        since_s: when it was made, in seconds of the system's clock.
        command: what runs on it, empty if nothing has yet.
    """

    id: int
    pid: int
    files: Sequence[int]
    link_bps: float
    uplinks_bps: Sequence[float]
    since_s: float
    command: Sequence[str] = ()

    @property
    def hosts(self) -> int:
        """How many hosts it has."""
        return len(self.files) - 1

    @property
    def links(self) -> Links:
        """Its links, to be changed."""
        return Links([path_of(file, self.pid) for file in self.files])


class Entry:
    """A lab of this process in the list of running labs, until it is closed.

    Args:
        files, link_bps, uplinks_bps: as for ``RunningLab``.

    Raises:
        RuntimeError: the list cannot be written.
    """

    def __init__(self, files: Sequence[int], link_bps: float, uplinks_bps: Sequence[float]) -> None:
        with _locked() as folder:
            for path in _files(folder):
                with path.open() as file:
                    if not _held(file):
                        path.unlink()
            number = next(n for n in count(1) if not _file(folder, n).exists())
            self._path = _file(folder, number)
            self._file = self._path.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._lab = RunningLab(
                number, os.getpid(), files, link_bps, uplinks_bps, since_s=time.time()
            )
            self._write()

    def note(self, command: Sequence[str]) -> None:
        """Says what runs on the lab."""
        with _locked():
            self._lab = replace(self._lab, command=command)
            self._write()

    def close(self) -> None:
        """Takes the lab off the list."""
        with _locked(), self._file:
            self._path.unlink(missing_ok=True)
            # A process forked from this one may have the file open still.
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _write(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        json.dump(asdict(self._lab), self._file)
        self._file.flush()


def running_labs() -> list[RunningLab]:
    """The labs of this user that run on this machine, in the order of their ids.

    Raises:
        RuntimeError: the list cannot be read.
    """
    found: list[RunningLab] = []
    with _locked() as folder:
        for path in _files(folder):
            with path.open() as file:
                if _held(file):
                    found.append(RunningLab(**json.load(file)))
    return sorted(found, key=lambda lab: lab.id)


def _folder() -> Path:
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/soonest")
    return Path(tempfile.gettempdir()) / f"soonest-{os.geteuid()}"


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    """Yields the folder, in which nobody else reads or writes meanwhile."""
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.geteuid():
            raise PermissionError(0, "it belongs to another user")
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise RuntimeError(
            f"the list of running labs cannot be kept in {folder} ({error.strerror}): remove it, "
            "or make room for it"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _file(folder: Path, number: int) -> Path:
    return folder / f"lab-{number}.json"


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("lab-*.json"))


def _held(file: IO[str]) -> bool:
    """Whether a lab that runs holds this file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
