"""Two ranks that live long and train one loop after the other, in all the ways that there are."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import os
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any

import torch.distributed as dist

# pyright: reportUnusedImport=false
from fuzz import gradients, passes, states, structure, weights  # noqa: F401
from fuzz.arms import DDP, TIMEOUT_S, Arm
from fuzz.looks import differences
from fuzz.loops import Loop
from fuzz.run import Run
from helpers.ranks import context, join
from soonest import SoonestError
from soonest.runtime.comm.error_text import is_of_backend
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.tuning import autotuner, candidates, trials

RANKS = 2
EQUAL, RAISED, REFUSED, BROKEN, DIFFERENT, HANGS = (
    "equal", "raised by DDP", "refused", "broken", "different", "hangs",
)  # fmt: skip
"""How a loop comes out: DDP itself raises; soonest raises a sentence, or some other error."""
BAD = (BROKEN, DIFFERENT, HANGS)
_ALL_CANDIDATES, _TURN = trials.CANDIDATES, autotuner.STEPS
_SLOW_S = 2e-3
_AT_ONCE = 15
"""So many loops, then others take over: processes keep threads of all groups they have had."""
_NO_SENTENCES = ("an update failed: ", "a thread that communicates has ended")
"""What soonest says of something else that broke."""
_STACKS, _ERRORS = ".stacks", ".errors"


@dataclass(frozen=True)
class Outcome:
    """How a loop came out.

    Args:
        kind: one of the words above.
        text: the sentence, the error, or where it differs.
        at: the number of the line.
    """

    kind: str
    text: str = ""
    at: int = -1


# On a rank


def _steer(loop: Loop) -> None:
    """Which plans have turns in this loop, and how long what is sent takes."""
    wanted = loop.setting("plan")
    usual, *others = _ALL_CANDIDATES
    if wanted == "turns":
        Random(loop.seed).shuffle(others)
        trials.CANDIDATES = (usual, *others)
    elif wanted == "blocking":
        trials.CANDIDATES = (candidates.LIKE_DDP,)
    elif wanted == "one bucket":
        trials.CANDIDATES = (_ALL_CANDIDATES[-1],)
    else:
        trials.CANDIDATES = (usual,)
    autotuner.STEPS = 1 if wanted == "turns" else _TURN
    BoundPlan.issue = _slowly if loop.setting("slow") else _issue  # type: ignore[method-assign]


_issue = BoundPlan.issue


def _slowly(self: BoundPlan, *args: Any) -> Any:
    time.sleep(_SLOW_S)
    return _issue(self, *args)


@dataclass
class _Found:
    """What a rank tells of one run."""

    seen: list[tuple[int, Any]]
    error: Outcome | None = None


def _run(loop: Loop, name: str) -> _Found:
    arm = Arm(name, loop)
    run: Run | None = None
    try:
        run = Run(loop, arm)
        run.train()
        return _Found(run.seen)
    except Exception as error:
        kind = REFUSED if _is_sentence(error, error.__traceback__) else BROKEN
        text = f"{type(error).__name__}: {error}"
        if kind == BROKEN:
            text += _where(error.__traceback__)
        return _Found(run.seen if run else [], Outcome(kind, text, run.at if run else -1))
    finally:
        run = None
        try:
            arm.end()
        except Exception:
            traceback.print_exc()


def _is_sentence(error: Exception, trace: TracebackType | None) -> bool:
    """Whether soonest itself has raised it, and not something that broke in there."""
    if isinstance(error, SoonestError):
        return not str(error).startswith(_NO_SENTENCES)
    *_, last = traceback.walk_tb(trace)
    inside = f"{os.sep}soonest{os.sep}" in last[0].f_code.co_filename
    planning = f"{os.sep}core{os.sep}" in last[0].f_code.co_filename  # of which no user knows
    return inside and not planning and isinstance(error, ValueError | TypeError | RuntimeError)


def _where(trace: TracebackType | None) -> str:
    frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)]
    return " at " + " < ".join(frames[::-1][:6])


def _compare(ddp: _Found, ours: _Found) -> Outcome:
    if ours.error:
        return ours.error
    for (at, a), (_, b) in zip(ddp.seen, ours.seen, strict=True):
        if told := [text for key in a for text in differences(a[key], b[key], key)]:
            return Outcome(DIFFERENT, "; ".join(told[:4]), at)
    return Outcome(EQUAL)


def _serve(rank: int, port: int, pipe: Connection, dump: str) -> None:
    """Trains what it is told to, until it is told nothing more."""
    with open(dump, "w") as stacks:
        faulthandler.register(12, stacks, all_threads=True)
        warnings.simplefilter("ignore")
        with open(dump + _ERRORS, "w") as errors:
            os.dup2(errors.fileno(), 2)
        join(rank, RANKS, port, TIMEOUT_S)
        # Those that are gone must not give their names to others: the store remembers them.
        numbers = itertools.count()
        dist.distributed_c10d._hash_ranks_to_str = lambda ranks: f"group {next(numbers)}"
        gc.collect()
        gc.freeze()
        known: Loop | None = None
        ddp = _Found([])
        while (job := pipe.recv()) is not None:
            loop, name = job
            _steer(loop)
            if known != loop:
                known, ddp = loop, _run(loop, DDP)
            if ddp.error is not None:
                pipe.send(Outcome(RAISED, ddp.error.text, ddp.error.at))
            else:
                pipe.send(_compare(ddp, _run(loop, name)))


# Where they are started


class Pair:
    """Two ranks; others take their place when they have gone astray.

    Args:
        patience_s: how long a loop may take.
    """

    def __init__(self, patience_s: float = 150.0) -> None:
        self._patience_s = patience_s
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._trained = 0

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(self, loop: Loop, arms: Iterable[str]) -> dict[str, Outcome]:
        """How a loop comes out, by the way in which it is trained.

        If DDP itself raises, and not because the group is broken, the others are not tried, and
        have that for their outcome.
        """
        found: dict[str, Outcome] = {}
        self._trained += 1
        if self._trained > _AT_ONCE:
            self.close()
        for arm in arms:
            found[arm] = self.train_as(loop, arm)
            if found[arm].kind == RAISED and is_of_backend(RuntimeError(found[arm].text)):
                self.close()  # what was trained before may have broken the group
                found[arm] = self.train_as(loop, arm)
            if found[arm].kind == RAISED:
                return dict.fromkeys(arms, found[arm])
        return found

    def train_as(self, loop: Loop, arm: str) -> Outcome:
        """The same of one way."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((loop, arm))
        outcomes = self._outcomes()
        errors = [one for one in outcomes if one.kind not in (EQUAL, DIFFERENT)]
        together = len({(one.kind, one.at) for one in outcomes}) == 1
        lost = any(one.text.startswith("PeerLostError") for one in errors)
        if errors and (lost or not (together and errors[0].kind in (REFUSED, RAISED))):
            self.close()
        worst = max(outcomes, key=lambda one: _WORSE.index(one.kind))
        if worst.kind == REFUSED and all(one.text.startswith("PeerLostError") for one in errors):
            return Outcome(BROKEN, worst.text, worst.at)  # no rank is lost, and none says why
        return worst

    def _outcomes(self) -> list[Outcome]:
        """Of all ranks; a rank that does not answer in time hangs, or has died."""
        deadline = time.monotonic() + self._patience_s
        outcomes: dict[int, Outcome] = {}
        left = dict(enumerate(self._pipes))
        while left and (ready := wait(list(left.values()), max(0, deadline - time.monotonic()))):
            for rank, pipe in list(left.items()):
                if pipe in ready:
                    del left[rank]
                    try:
                        outcomes[rank] = pipe.recv()
                    except (EOFError, OSError):
                        self._processes[rank].join(5)
                        outcomes[rank] = Outcome(
                            BROKEN, f"rank {rank} died{self._last_words(rank)}"
                        )
        if left and not any(one.kind == RAISED for one in outcomes.values()):
            for rank in left:
                told = "; ".join(f"rank {r}: {one.kind} {one.text}" for r, one in outcomes.items())
                outcomes[rank] = Outcome(HANGS, f"rank {rank}. {told}\n{self._stack_of(rank)}")
        return list(outcomes.values())

    def _stack_of(self, rank: int) -> str:
        with suppress(OSError):
            os.kill(self._processes[rank].pid, 12)
        time.sleep(0.5)
        text = Path(self._folder.name, f"{rank}{_STACKS}").read_text(encoding="utf-8")
        return re.sub(r'File ".*/site-packages/', 'File "', text)

    def _last_words(self, rank: int) -> str:
        text = Path(self._folder.name, f"{rank}{_STACKS}{_ERRORS}").read_text(encoding="utf-8")
        told = [line for line in text.splitlines() if "Warning" not in line]
        return "".join(f": {line.strip()}" for line in told[-3:])

    def _start(self) -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._store, self._folder = store, tempfile.TemporaryDirectory()
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            dump = str(Path(self._folder.name, f"{rank}{_STACKS}"))
            process = context.Process(
                target=_serve, args=(rank, store.port, theirs, dump), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def close(self) -> None:
        """Ends both."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        self._trained = 0


_WORSE: Sequence[str] = (EQUAL, REFUSED, DIFFERENT, BROKEN, HANGS, RAISED)
