"""Changes the source in small ways, one at a time, and tells which of them the tests notice.

    python benchmarks/mutants.py --json benchmarks/records/mutants.json
    python benchmarks/mutants.py --only report/ --again

The changes are listed in ``mutants.toml``: mistakes that could have been made, each with the tests
that are nearest to it. Tests run on a copy of the repository in a temporary folder, in a process
that is forked off this one, so that what they import is imported once. Before a change counts, its
tests must pass without it. What the record already has of the same change is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")
_COPIED = ("src", "tests", "benchmarks", "docs", "examples", ".github")
_IMPORTED = (
    *("torch._dynamo", "torch.distributed.checkpoint.state_dict", "numpy", "hypothesis"),
    *("matplotlib.figure", "rich.table", "h5py", "cv2", "google.protobuf"),
)
"""By tests of most rooms; none of it may import what is changed."""
_LEAST_S, _TIMES = 300.0, 8.0
"""Tests that take longer than both, the second in times of what they take unchanged, hang."""
_UNCHANGED_S = 1800.0
_TAIL = 400
"""Characters of the output that are kept where the tests of unchanged source fail."""


@dataclass(frozen=True)
class Change:
    """A change of behaviour.

    Args:
        file: that has it, below ``src/soonest``.
        what: is wrong then, in a few words.
        old, new: texts; the old one occurs once in the file.
        tests: arguments of pytest, the tests nearest to it.
    """

    file: str
    what: str
    old: str
    new: str
    tests: str

    @property
    def name(self) -> str:
        return f"{self.file}: {self.what}"

    @property
    def key(self) -> str:
        """Differs once the change does, or the file apart from it that has it."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def apply(self, text: str) -> str:
        """The source with it.

        Raises:
            ValueError: the old text does not occur exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: its old text occurs {text.count(self.old)} times, not once: "
                f"{self.old!r}"
            )
        return text.replace(self.old, self.new)


def changes(path: Path = LIST) -> list[Change]:
    """All that a list holds."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Change(part["file"], what, old, new, tests[0] if tests else part["tests"])
        for part in data["part"]
        for what, old, new, *tests in part["changes"]
    ]


class Copy:
    """A copy of the repository in which one thing at a time is other than in the source.

    Args:
        root: of the repository.
        folder: of the copy; must not be there.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for path in root.iterdir():
            if path.name in _COPIED:
                skip = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis")
                shutil.copytree(path, folder / path.name, ignore=skip)
            elif path.is_file():
                shutil.copy2(path, folder / path.name)
        self._changed: tuple[Path, str] | None = None

    def make(self, change: Change | None) -> None:
        """Makes a change, or none, and takes the one before it back."""
        if self._changed is not None:
            self._write(*self._changed)
            self._changed = None
        if change is not None:
            path = self.folder / "src" / "soonest" / change.file
            text = path.read_text(encoding="utf-8")
            self._write(path, change.apply(text))
            self._changed = path, text

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # Python tells what it has compiled by size and seconds, which may be the same.
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()

    def start(self, tests: str) -> Started:
        """Starts tests in a process of their own."""
        out = self.folder / "out.txt"
        pid = os.fork()
        if pid:
            return Started(pid, out, time.monotonic())
        code = 3
        with contextlib.suppress(BaseException):
            os.setsid()
            file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(file, descriptor)
            os.chdir(self.folder)
            source = str(self.folder / "src")
            os.environ["PYTHONPATH"] = source  # of processes that tests start
            sys.path[:0] = [source, str(self.folder)]
            usual = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
            code = int(pytest.main([*usual, *shlex.split(tests)]))
            sys.stdout.flush()
        os._exit(code)


@dataclass
class Started:
    """Tests that run.

    Args:
        pid: the process that leads theirs.
        out: where their output goes.
        began_s: when.
    """

    pid: int
    out: Path
    began_s: float
    code: int | None = None
    took_s: float = 0.0

    def ended(self, limit_s: float) -> bool:
        """Whether they have; beyond the limit they are ended, and their code stays None."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        self.took_s = time.monotonic() - self.began_s
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
        elif self.took_s <= limit_s:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self.pid, 0)
        return True

    def first_failure(self) -> str:
        """The test that failed, as pytest names it."""
        said = self.out.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in said if line.startswith(("FAILED", "ERROR"))]
        return lines[0].split(" - ")[0].split(maxsplit=1)[1] if lines else "the run itself"


def plan(wanted: Iterable[Change], known: dict[str, Any]) -> Iterator[tuple[Change, bool]]:
    """What to run: changes that are not known, each behind its tests without any."""
    passing = {found["tests"] for found in known.values()}
    for change in wanted:
        if change.key in known:
            continue
        if change.tests not in passing:
            passing.add(change.tests)
            yield change, False
        yield change, True


class Runs:
    """Runs changes, several at a time, each in a copy of its own.

    Args:
        root: of the repository.
        folder: for the copies.
        known: what is known of changes by their keys; gets what is found.
    """

    def __init__(self, root: Path, folder: Path, known: dict[str, Any]) -> None:
        self._root, self._folder, self._known = root, folder, known
        self._usual_s: dict[str, float] = {}
        self.failing: set[str] = set()

    def all(self, wanted: Sequence[Change], jobs: int) -> Iterator[str]:
        """Runs what is not known yet, and tells of each, in words."""
        # A queue for each copy, so that tests without a change come before those with one.
        parts = list(plan(wanted, self._known))
        tests = list(dict.fromkeys(change.tests for change, _ in parts))
        jobs = max(1, min(jobs, len(tests)))
        queues = [
            [part for part in parts if tests.index(part[0].tests) % jobs == job]
            for job in range(jobs)
        ]
        copies = [Copy(self._root, self._folder / str(job)) for job in range(jobs)]
        running: list[tuple[Change, bool, Started] | None] = [None] * jobs
        while any(queues) or any(running):
            for job, queue in enumerate(queues):
                now = running[job]
                if now is not None:
                    change, changed, started = now
                    if not started.ended(self._limit_s(change) if changed else _UNCHANGED_S):
                        continue
                    running[job] = None
                    yield self._take(change, changed, started)
                while queue and running[job] is None:
                    change, changed = queue.pop(0)
                    if change.tests in self.failing:
                        continue
                    copies[job].make(change if changed else None)
                    running[job] = change, changed, copies[job].start(change.tests)
            time.sleep(0.05)

    def _limit_s(self, change: Change) -> float:
        return max(_LEAST_S, _TIMES * self._usual_s.get(change.tests, 0.0))

    def _take(self, change: Change, changed: bool, started: Started) -> str:
        if not changed:
            if started.code != 0:
                self.failing.add(change.tests)
                said = started.out.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
                return f"FAILS UNCHANGED  {change.tests} ({started.code}): {said}"
            self._usual_s[change.tests] = started.took_s
            return f"passes  {change.tests} ({started.took_s:.0f} s)"
        noticed = started.code != 0
        by = "they did not end" if started.code is None else started.first_failure()
        self._known[change.key] = {
            "file": change.file,
            "change": change.what,
            "noticed": noticed,
            "by": by if noticed else None,
            "tests": change.tests,
            "seconds": round(started.took_s, 1),
        }
        return f"{'noticed' if noticed else 'NOT NOTICED'}  {change.name} ({started.took_s:.0f} s)"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="changes whose file or words hold this text")
    parser.add_argument("--again", action="store_true", help="also those that went by before")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/records/mutants.json")
    args = parser.parse_args(arguments)
    every = changes()
    before = json.loads(args.json.read_text())["changes"] if args.json.exists() else {}
    keys = {change.key for change in every}
    known = {key: found for key, found in before.items() if key in keys}
    wanted = [change for change in every if args.only in change.name]
    if args.again:
        known = {
            key: found
            for key, found in known.items()
            if found["noticed"] or key not in {change.key for change in wanted}
        }
    for name in _IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="soonest-mutants-") as folder:
        runs = Runs(ROOT, Path(folder), known)
        for told in runs.all(wanted, args.jobs):
            done = sum(change.key in known for change in wanted)
            print(f"{done}/{len(wanted)}  {told}", flush=True)
            _write(args.json, every, known)
    missed = [known[c.key] for c in wanted if c.key in known and not known[c.key]["noticed"]]
    print(f"{sum(c.key in known for c in wanted) - len(missed)} noticed, {len(missed)} not")
    for found in missed:
        print(f"    {found['file']}: {found['change']} (by {found['tests']})")
    return int(bool(missed or runs.failing))


def _write(path: Path, every: Sequence[Change], known: dict[str, Any]) -> None:
    found = {change.key: known[change.key] for change in every if change.key in known}
    noticed = sum(one["noticed"] for one in found.values())
    record = {"listed": len(every), "run": len(found), "noticed": noticed, "changes": found}
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
