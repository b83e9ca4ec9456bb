"""Runs a command once per rank: starts the ranks, streams their output and ends them together."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

OnLine = Callable[[int, str], None]
"""Called with a rank and one line of its output, without the line's end."""

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


@dataclass(frozen=True)
class Rank:
    """How one rank is started.

    Args:
        command: program and arguments.
        env: its whole environment.
        pass_fds: open files that it inherits.
    """

    command: Sequence[str]
    env: Mapping[str, str]
    pass_fds: Sequence[int] = ()


def run_ranks(
    ranks: Sequence[Rank],
    *,
    on_line: OnLine | None = None,
    timeout_s: float | None = None,
    grace_s: float = GRACE_S,
) -> int:
    """Runs all ranks at once until they end; when one fails, the others are ended.

    Each rank leads a process group of its own, and what is left of that when the rank ends is
    killed. However this function is left, it leaves no process behind; and if this process is
    killed, all of them are.

    Args:
        ranks: what to start.
        on_line: gets every line of output, stdout and stderr alike, in the calling thread; by
            default lines are printed as ``[rank] line``.
        timeout_s: end all ranks after so many seconds.
        grace_s: seconds between SIGTERM and SIGKILL.

    Returns:
        0 if all ranks returned 0, otherwise the code of the rank that failed first; 128 + n if
        it was ended by signal n.

    Raises:
        TimeoutError: the ranks did not end in time.
    """
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    with _watcher() as watch, selectors.DefaultSelector() as selector:
        group = _Group(on_line or _print_line, watch, selector)
        try:
            for number, rank in enumerate(ranks):
                group.start(number, rank)
            while group.running and not group.failed:
                if deadline_s is not None and time.monotonic() > deadline_s:
                    raise TimeoutError(f"the ranks did not end within {timeout_s:g} s")
                group.pump(_TICK_S)
        finally:
            group.end(grace_s)
    return group.failed[0] if group.failed else 0


def torchrun_env(
    env: Mapping[str, str] | None,
    *,
    rank: int,
    ranks: int,
    one_host: bool,
    address: str,
    port: int,
    interface: str,
) -> dict[str, str]:
    """The environment that torchrun would give to a rank.

    Args:
        env: added to this process's environment; wins over all but the torchrun variables.
        rank: of ``ranks``.
        one_host: whether all ranks share one host, or each has its own.
        address, port: where rank 0 listens.
        interface: network interface that gloo binds to.
    """
    defaults = {
        "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # Without it every rank warns that the lab has no name server.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    # An interface named for the world outside does not exist inside.
    outer = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    numbers = {
        "RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_RANK": rank if one_host else 0,
        "LOCAL_WORLD_SIZE": ranks if one_host else 1,
        "GROUP_RANK": 0 if one_host else rank,
        "GROUP_WORLD_SIZE": 1 if one_host else ranks,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": ranks,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    return {
        **defaults,
        **outer,
        **(env or {}),
        **{name: str(value) for name, value in numbers.items()},
        "ROLE_NAME": "default",
        "MASTER_ADDR": address,
        "TORCHELASTIC_RUN_ID": "soonest-lab",
        # Rank 0 serves the store itself: there is no agent that would.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def check_command(command: Sequence[str], env: Mapping[str, str] | None) -> None:
    """Raises ValueError if there is no such command on the PATH that it will see."""
    program = command[0] if command else ""
    path = {**os.environ, **(env or {})}.get("PATH")
    if shutil.which(program, path=path) is None:
        raise ValueError(f"no command {program!r} here: give a program on PATH, or its path")


@dataclass
class _Running:
    rank: int
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    partial: bytes = b""


@dataclass
class _Group:
    """The ranks of one run.

    Everything happens in the thread that runs it, so no line and no exit is seen twice or too late.
    """

    on_line: OnLine
    watch: IO[str]
    selector: selectors.BaseSelector
    running: list[_Running] = field(default_factory=list[_Running])
    failed: list[int] = field(default_factory=list[int])

    def start(self, number: int, rank: Rank) -> None:
        # The kernel then kills it when the thread that starts it ends, that is the one that waits.
        prefix = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        process = subprocess.Popen(
            [*prefix, *rank.command],
            env=rank.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=rank.pass_fds,
            # Ctrl-C in a terminal then reaches only this process, which ends the ranks once.
            process_group=0,
        )
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
            if code:
                self.failed.append(code if code > 0 else 128 - code)
            _signal(running.process.pid, signal.SIGKILL)
            self._mention(running.process.pid)
            self._close(running)

    def end(self, grace_s: float) -> None:
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
