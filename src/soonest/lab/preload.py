"""Starts ranks by forking them from one process that has imported torch: see ``nursery.py``."""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from soonest.lab.rank import Process, Rank, ending_with_parent, find_program

_FROM_RANKS = 8
"""With fewer, importing torch in each of them is soon done."""

_NURSERY = Path(__file__).with_name("nursery.py")


def should_preload(preload: bool | None, command: Sequence[str], ranks: Sequence[Rank]) -> bool:
    """Whether to fork the ranks of a run from a process that has imported torch.

    Args:
        preload: the user's wish, None if there is none.
        command: program and arguments.
        ranks: where it runs.

    Raises:
        ValueError: it is wished for where it is not possible.
    """
    possible = sys.platform == "linux" and _is_plain_python(command, ranks[0].env)
    if preload and not possible:
        raise ValueError(
            f"{' '.join(command[:2])!r} cannot be preloaded: on Linux, {sys.executable} with a "
            "script, -m or -c can; leave preload out for anything else"
        )
    return possible and len(ranks) >= _FROM_RANKS if preload is None else preload


def _is_plain_python(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether a command is this very interpreter, told only what to run."""
    program, *args = command
    path = Path(find_program([program], env))
    ours = Path(sys.executable)
    # Environments share an interpreter by links: the folder tells them apart.
    if path.resolve() != ours.resolve() or path.parent.resolve() != ours.parent.resolve():
        return False
    if args[:1] in (["-m"], ["-c"]):
        return len(args) > 1
    # Folders and archives run too, but by ways of their own.
    return os.path.isfile(args[0]) and pkgutil.get_importer(args[0]) is None if args else False


@contextlib.contextmanager
def forked(command: Sequence[str], ranks: Sequence[Rank]) -> Iterator[Iterator[Process]]:
    """Starts ranks that share what importing torch takes, until the block is left.

    Args:
        command: a command that ``should_preload`` agreed to.
        ranks: where it runs.
    """
    # How torch starts depends on variables, so the common ones must be there before it is imported.
    common = dict(set.intersection(*(set(rank.env.items()) for rank in ranks)))
    with contextlib.ExitStack() as stack:
        outputs: list[IO[bytes]] = []
        inputs: list[int] = []
        for _ in ranks:
            output, into = os.pipe()
            outputs.append(stack.enter_context(open(output, "rb", buffering=0)))
            inputs.append(into)
        try:
            nursery = subprocess.Popen(
                [*ending_with_parent(), find_program(command, ranks[0].env), str(_NURSERY)],
                env=common,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=inputs,
                process_group=0,
            )
        finally:
            for into in inputs:
                os.close(into)
        stack.enter_context(nursery)
        # If this block is left early, that ends the ranks with it.
        stack.callback(nursery.kill)
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        places = [
            {
                "env": dict(set(rank.env.items()) - common.items()),
                "namespace": rank.namespace,
                "output": into,
            }
            for rank, into in zip(ranks, inputs, strict=True)
        ]
        with nursery.stdin as request:
            request.write(json.dumps({"args": command[1:], "ranks": places}).encode())
        reports = _Reports(nursery.stdout.fileno())
        yield (_Forked(reports.next_pid(), output, reports) for output in outputs)


@dataclass
class _Reports:
    """What the nursery says: the ranks' process ids in order, then exit codes as they end."""

    file: int
    codes: dict[int, int] = field(default_factory=dict[int, int])
    over: bool = False
    pids: list[int] = field(default_factory=list[int])
    partial: bytes = b""

    def next_pid(self) -> int:
        while not self.pids:
            if self.over:
                raise RuntimeError(
                    "the process that imports torch for all ranks ended: run without preload to "
                    "see why"
                )
            self.read(wait=True)
        return self.pids.pop(0)

    def read(self, *, wait: bool) -> None:
        os.set_blocking(self.file, wait)
        try:
            chunk = os.read(self.file, 1 << 16)
        except BlockingIOError:
            return
        self.over = not chunk
        *lines, self.partial = (self.partial + chunk).split(b"\n")
        for line in lines:
            pid, *code = map(int, line.split())
            if code:
                self.codes[pid] = code[0]
            else:
                self.pids.append(pid)


@dataclass(frozen=True)
class _Forked:
    """A rank as a process, in the terms of ``subprocess.Popen``."""

    pid: int
    stdout: IO[bytes]
    reports: _Reports

    def poll(self) -> int | None:
        self.reports.read(wait=False)
        # The ranks end with the nursery.
        return self.reports.codes.get(self.pid, -signal.SIGKILL if self.reports.over else None)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            self.reports.read(wait=True)
        return code
