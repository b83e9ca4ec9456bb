"""``SOONEST_CHECK``: every so often, the ranks compare what they train, bit by bit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from soonest.errors import SoonestError
from soonest.runtime import comm
from soonest.runtime.agreement import by_rank
from soonest.runtime.engine.engine import Engine

VARIABLE = "SOONEST_CHECK"
USUAL = 10
"""Steps from one comparison to the next, if the user does not say how many."""
_CHUNK = 1 << 16
_MASK = (1 << 64) - 1


def interval() -> int:
    """Steps from one comparison to the next, as the environment says; 0 for never.

    Raises:
        ValueError: it does not say how many.
    """
    text = os.environ.get(VARIABLE, "").strip().lower()
    if text in ("", "off", "no", "false"):
        return 0
    if text in ("on", "yes", "true"):
        return USUAL
    if not text.isdecimal():
        raise ValueError(
            f"{VARIABLE} is {text!r}, but must be a number of steps, or on for every {USUAL}th, or "
            "off"
        )
    return int(text)


class Comparison:
    """Compares parameters, and the optimizer's state where every rank has all of it.

    Args:
        group: all ranks; for nothing else, as some may be at another point when they come here.
        every: so many steps.
        after_step: what else is to be done at the end of each.
    """

    def __init__(self, group: comm.Group, every: int, after_step: Callable[[Engine], None]) -> None:
        self._group = group
        self._every = every
        self._after_step = after_step
        self._steps = 0
        self._due = every

    def __call__(self, engine: Engine) -> None:
        """To be called after every step that used averaged gradients; a collective call.

        Raises:
            SoonestError: on every rank, with the first that differs.
        """
        self._steps += 1
        # By backward passes: no rank can be ahead in these without waiting for the others.
        if engine.backward.passes >= self._due:
            self._due = engine.backward.passes + self._every
            self._compare_progress(engine)
            engine.flush()
            self._compare(list(_checksums(engine)))
            engine.watch()
        self._after_step(engine)

    def _compare_progress(self, engine: Engine) -> None:
        """Before anything is waited for: what one rank has left out, others would wait for."""
        mine = f"{engine.backward.passes} backward passes, {self._steps} steps"
        every = comm.gather_objects(self._group, mine)
        if len(set(every)) > 1:
            raise SoonestError(
                f"{VARIABLE}: the ranks are not equally far: {by_rank(every)}. Every rank must run "
                "as many backward passes, but for those under no_sync(), and call step() as often"
            )

    def _compare(self, mine: list[tuple[str, int]]) -> None:
        digest = hashlib.sha256(repr(mine).encode()).hexdigest()
        if len(set(comm.gather_objects(self._group, digest))) == 1:
            return
        ranks = [dict(theirs) for theirs in comm.gather_objects(self._group, mine)]
        names = list(dict.fromkeys(name for theirs in ranks for name in theirs))
        wrong = [name for name in names if len({theirs.get(name) for theirs in ranks}) > 1]
        sums = [f"{r[wrong[0]]:016x}" if wrong[0] in r else "nothing" for r in ranks]
        more = f" (so do {len(wrong) - 1} more of {len(names)})" if len(wrong) > 1 else ""
        settings = [name for name in wrong[1:] if name.startswith(_SETTINGS)]
        hint = f" {settings[0].capitalize()} differ, too." if settings else ""
        raise SoonestError(
            f"{VARIABLE}: after step {self._steps} {wrong[0]} differs between the ranks{more}: "
            f"{by_rank(sums)}.{hint} Something has changed it on some ranks only: look for what a "
            f"step does by rank; {VARIABLE}=1 finds the first such step"
        )


_SETTINGS = "the optimizer's settings"


def _checksums(engine: Engine) -> Iterator[tuple[str, int]]:
    """Everything that is to be equal on all ranks, by what it is."""
    named = [(n, p) for n, p in engine.model.named_parameters() if n not in engine.layout.without]
    for name, parameter in named:
        yield f"parameter {name!r}", checksum(parameter)
    state = engine.optimizer.__dict__["state"]
    if engine.state.parts is None:
        for name, parameter in named:
            if parameter in state:
                yield f"the optimizer's state of {name!r}", _of(state[parameter])
    for number, group in enumerate(engine.optimizer.param_groups):
        settings = {name: value for name, value in group.items() if name != "params"}
        yield f"{_SETTINGS} in group {number}", _of(settings)


def _of(values: dict[str, Any]) -> int:
    found = [
        (name, checksum(value) if isinstance(value, Tensor) else repr(value))
        for name, value in sorted(values.items())
        if isinstance(value, Tensor | int | float | str | tuple)
    ]
    return int(hashlib.sha256(repr(found).encode()).hexdigest()[:16], 16)


def checksum(tensor: Tensor) -> int:
    """64 bits that depend on every bit of a dense tensor, and where it is; wherever it is made.

    Args:
        tensor: of any shape and dtype, on any device; the host waits for it.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = real.detach().cpu().reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = flat.numel()
    for chunk in bits.split(_CHUNK):
        part = int(torch.dot(chunk.long(), _weights()[: chunk.numel()]))
        total = (31 * total + part) & _MASK
    return total


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def _weights() -> Tensor:
    """Odd numbers that differ, modulo 2 to the 64th."""
    return torch.arange(1, 2 * _CHUNK, 2) * -0x61C8864680B583EB
