"""Runs a command once per rank: starts the ranks, streams their output and ends them together."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from soonest.lab.preload import forked, should_preload
from soonest.lab.rank import Process, Rank, find_program, start

OnLine = Callable[[int, str], None]
"""Called with a rank and one line of its output, without the line's end."""

OnFailure = Callable[[int, int], None]
"""Called with the rank that failed first, and its exit code."""

GRACE_S = 5.0
"""How long a rank may take to end after SIGTERM before it is killed."""

_TICK_S = 0.05

# Kills the process groups that it was told of (a second mention withdraws one) once its input
# ends, which happens however the parent dies. Death signals alone reach only direct children.
_WATCH = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    groups ^= {int(line)}
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


def run_ranks(
    command: Sequence[str],
    ranks: Sequence[Rank],
    *,
    preload: bool | None = None,
    on_line: OnLine | None = None,
    on_failure: OnFailure | None = None,
    timeout_s: float | None = None,
    grace_s: float = GRACE_S,
    passed_on: Collection[signal.Signals] = (),
) -> int:
    """Runs a command as all ranks at once until they end; when one fails, the others are ended.

    Each rank leads a process group of its own, and what is left of that when the rank ends is
    killed. However this function is left, it leaves no process behind; and if this process is
    killed, all of them are.

    Args:
        command: program and arguments.
        ranks: where it runs.
        preload: start Python with torch already imported, once for all ranks: sooner, and in less
            memory. By default where the command is this Python interpreter with a script, ``-m``
            or ``-c``, and there are 8 ranks or more. What the script does before it imports torch
            comes too late to change how torch starts; variables in ``env`` do not.
        on_line: gets every line of output, stdout and stderr alike, in the calling thread; by
            default lines are printed as ``[rank] line``.
        on_failure: gets the rank that failed first and its code, before the others are ended.
        timeout_s: end all ranks so many seconds after they were started.
        grace_s: seconds between SIGTERM and SIGKILL.
        passed_on: signals that the ranks get when this process does, which goes on; only in the
            main thread. Of SIGINT this holds once: the second one ends the ranks, too.

    Returns:
        0 if all ranks returned 0, otherwise the code of the rank that failed first; 128 + n if
        it was ended by signal n.

    Raises:
        ValueError: there is no such command, or it cannot be preloaded.
        TimeoutError: the ranks did not end in time.
        KeyboardInterrupt: a rank failed on a SIGINT that was passed on, or a second one came.
    """
    find_program(command, ranks[0].env)
    fork = should_preload(preload, command, ranks)
    with (
        _watcher() as watch,
        selectors.DefaultSelector() as selector,
        forked(command, ranks) if fork else _started(command, ranks) as processes,
    ):
        group = _Group(on_line or _print_line, on_failure, watch, selector)
        try:
            for number, process in enumerate(processes):
                group.add(number, process)
            deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
            with _passing_on(passed_on, group):
                while group.running and group.code == 0:
                    if deadline_s is not None and time.monotonic() > deadline_s:
                        raise TimeoutError(f"the ranks did not end within {timeout_s:g} s")
                    group.pump(_TICK_S)
            if group.interrupted and group.code:
                raise KeyboardInterrupt
        finally:
            group.end(grace_s)
    return group.code


@contextlib.contextmanager
def _passing_on(numbers: Collection[signal.Signals], group: _Group) -> Iterator[None]:
    """Passes signals on to the ranks while inside, but for those that this process ignores."""

    def pass_on(number: int, _: object) -> None:
        if number == signal.SIGINT and group.interrupted:
            raise KeyboardInterrupt
        group.pass_on(signal.Signals(number))

    before = {
        number: handler
        for number in numbers
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    for number in before:
        signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _started(command: Sequence[str], ranks: Sequence[Rank]) -> Iterator[Iterator[Process]]:
    """Starts a fresh process per rank, each when it is asked for."""
    yield (start(command, rank) for rank in ranks)


@dataclass
class _Running:
    rank: int
    process: Process
    output: IO[bytes]
    partial: bytes = b""


@dataclass
class _Group:
    """The ranks of one run.

    Everything happens in the thread that runs it, so no line and no exit is seen twice or too late.
    """

    on_line: OnLine
    on_failure: OnFailure | None
    watch: IO[str]
    selector: selectors.BaseSelector
    running: list[_Running] = field(default_factory=list[_Running])
    code: int = 0
    ending: bool = False
    interrupted: bool = False

    def add(self, number: int, process: Process) -> None:
        assert process.stdout is not None
        running = _Running(number, process, process.stdout)
        self.running.append(running)
        self._mention(process.pid)
        os.set_blocking(running.output.fileno(), False)
        self.selector.register(running.output, selectors.EVENT_READ, running)

    def pump(self, wait_s: float) -> None:
        """Passes on what the ranks wrote, and takes note of those that ended."""
        for key, _ in self.selector.select(wait_s):
            if self._read(key.data) == 0:
                self.selector.unregister(key.fileobj)
        for running in list(self.running):
            code = running.process.poll()
            if code is None:
                continue
            self.running.remove(running)
            _signal(running.process.pid, signal.SIGKILL)
            self._mention(running.process.pid)
            self._close(running)
            if code and not self.code and not self.ending:
                self.code = code if code > 0 else 128 - code
                if self.on_failure and not self.interrupted:
                    self.on_failure(running.rank, self.code)

    def pass_on(self, number: signal.Signals) -> None:
        self.interrupted = self.interrupted or number == signal.SIGINT
        for running in list(self.running):
            _signal(running.process.pid, number)

    def end(self, grace_s: float) -> None:
        self.ending = True
        try:
            for running in self.running:
                _signal(running.process.pid, signal.SIGTERM)
            deadline_s = time.monotonic() + grace_s
            while self.running and time.monotonic() < deadline_s:
                self.pump(_TICK_S)
        finally:
            for running in self.running:
                _signal(running.process.pid, signal.SIGKILL)
            for running in self.running:
                running.process.wait()
                self._close(running)

    def _read(self, running: _Running) -> int:
        """Passes on what one rank wrote; bytes read, 0 at the end, -1 if there is nothing now."""
        try:
            chunk = os.read(running.output.fileno(), 1 << 16)
        except BlockingIOError:
            return -1
        *lines, running.partial = (running.partial + chunk).split(b"\n")
        for line in lines:
            self._pass_on(running, line)
        return len(chunk)

    def _pass_on(self, running: _Running, line: bytes) -> None:
        self.on_line(running.rank, line.decode(errors="replace").rstrip("\r"))

    def _close(self, running: _Running) -> None:
        if running.output in self.selector.get_map():
            self.selector.unregister(running.output)
        with running.output:
            # A process that left the group may still hold the pipe: do not wait for its end.
            for _ in range(64):
                if self._read(running) <= 0:
                    break
        if running.partial:
            self._pass_on(running, running.partial)

    def _mention(self, group: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.watch.write(f"{group}\n")
            self.watch.flush()


@contextlib.contextmanager
def _watcher() -> Iterator[IO[str]]:
    """Starts the watching process and yields its input."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCH],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
        text=True,
    )
    assert process.stdin is not None
    try:
        yield process.stdin
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _print_line(rank: int, line: str) -> None:
    sys.stdout.write(f"[{rank}] {line}\n")
    sys.stdout.flush()
