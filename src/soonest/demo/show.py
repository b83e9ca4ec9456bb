"""Shows the demo: its progress, and what came of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from soonest.core.timeline import Timeline
from soonest.demo.result import ArmResult, Result
from soonest.demo.settings import ARMS, Settings
from soonest.report.text import bars, coloured

_EVERY = 10
_WIDEST = 120


class Screen(Protocol):
    """Where the demo is shown; a context, for the time of the training."""

    def __enter__(self) -> Screen: ...

    def __exit__(self, *exc: object) -> None: ...

    def say(self, text: str) -> None:
        """Shows a sentence."""
        ...

    def watch(self, result: Result, arm: str) -> None:
        """Shows that an arm has done one more step."""
        ...

    def picture(self, timelines: Sequence[Timeline]) -> None:
        """Shows steps as bars of text."""
        ...


def screen(settings: Settings) -> Screen:
    """A terminal with moving bars if there is one, plain lines otherwise."""
    if sys.stdout.isatty():
        try:
            return _Terminal(settings)
        except ImportError:
            pass
    return _Lines(settings)


class _Lines:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def say(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def watch(self, result: Result, arm: str) -> None:
        done, of = len(result.arms[arm].losses[0]), sum(self._settings.turns(arm))
        if done % _EVERY == 0 or done == of:
            self.say(f"{ARMS[arm]:38} {done:4}/{of}  {_state(result.arms[arm])}")

    def picture(self, timelines: Sequence[Timeline]) -> None:
        self.say(bars(timelines))


class _Terminal:
    def __init__(self, settings: Settings) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
        )
        self._settings = settings
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Terminal:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def watch(self, result: Result, arm: str) -> None:
        if arm not in self._tasks:
            of = sum(self._settings.turns(arm))
            self._tasks[arm] = self._progress.add_task(ARMS[arm], total=of, state="")
        self._progress.update(self._tasks[arm], advance=1, state=_state(result.arms[arm]))

    def picture(self, timelines: Sequence[Timeline]) -> None:
        self._console.print(coloured(timelines, width=min(self._console.width, _WIDEST)))


def _state(arm: ArmResult) -> str:
    nats, seconds = arm.recent_nats(), arm.recent_s()
    state = f"loss {nats:.3f}  {nats / math.log(2):.2f} bits per byte"
    return state if seconds is None else f"{state}  {seconds * 1e3:.0f} ms per step"


def summary(result: Result) -> Iterator[str]:
    """What came of it, line by line."""
    untimed = sum(result.settings.turns("soonest")[: result.warm_turns])
    settled = result.arms["soonest"].settled_at is not None
    yield (
        f"Time of a step, from step {untimed + 1} on, when soonest's plan had settled:"
        if settled
        else "Time of a step; soonest's plans were still on trial, which more --steps would end:"
    )
    for name, title in ARMS.items():
        milliseconds, speedup = result.step_ms(name), result.speedup(name)
        if milliseconds is not None and speedup is not None:
            faster = "" if name == "ddp" else f"   {speedup:.2f} times as fast"
            yield f"  {title:38} {milliseconds:5.0f} ms{faster}"
    if result.bound_ms is not None:
        yield f"  {'what no schedule can beat':38} {result.bound_ms:5.0f} ms"
    yield f"Held-out text: {result.test_bits:.2f} bits per byte (8 before training)."
    differences = result.differences()
    if differences:
        yield "NOT IDENTICAL: soonest and DistributedDataParallel gave different results."
        yield from (f"  {difference}" for difference in differences)
    else:
        losses = sum(len(losses) for losses in result.arms["soonest"].losses)
        yield (
            f"Identical to the last bit: all {losses} losses, and every parameter after training "
            f"(checksum {result.arms['soonest'].checksums[0]})."
        )
