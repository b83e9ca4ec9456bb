"""Trains a model and reads and writes what is in flight, with the guard and without."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

import soonest
from helpers import reads, writes
from helpers.reads import Read, Zoo, flat
from helpers.steering import keep_to_the_usual_plan
from helpers.writes import Write
from soonest.runtime.engine import engine
from soonest.runtime.execute import bound_plan, thread_lane
from soonest.runtime.flat import buffers
from soonest.runtime.guard import pending

Found = dict[str, dict[str, bool]]


class Gate:
    """While it is shut nothing is sent until this rank waits for something.

    So what is read too early is always stale, however fast the machine is.
    """

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.shut = self._open.clear
        issue = bound_plan.BoundPlan.issue

        def issue_later(bound: Any, *args: Any) -> Any:
            self._open.wait()
            return issue(bound, *args)

        bound_plan.BoundPlan.issue = issue_later  # type: ignore[method-assign]
        for name in ("wait", "wait_all"):
            self._open_at(name)

    def _open_at(self, name: str) -> None:
        wait = getattr(thread_lane.ThreadLane, name)

        def waits(bound: Any, *args: Any, **options: Any) -> Any:
            self._open.set()
            return wait(bound, *args, **options)

        setattr(thread_lane.ThreadLane, name, waits)


class Flights:
    """A prioritized model whose plan has settled, trained on two ranks.

    Args:
        guard_on: whether what is in flight is guarded; otherwise it is as if there were no guard.
    """

    def __init__(self, *, guard_on: bool) -> None:
        self.model = reads.build()
        self.optimizer: Optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        keep_to_the_usual_plan()
        handle = soonest.prioritize(self.model, self.optimizer)
        self._apart = torch.Generator().manual_seed(dist.get_rank())
        self._alike = torch.Generator().manual_seed(7)
        while not handle.settled:  # planning waits for everything
            self.step()
        assert handle.engine
        handle.engine.after_step = lambda engine: None
        self._engine = handle.engine
        self._flush = engine.Engine.flush
        self._gate = Gate()
        if not guard_on:
            pending.PendingTensor.mark_pending = lambda self: None  # type: ignore[method-assign]
            engine.Engine.flush = lambda self: None  # type: ignore[method-assign]
            buffers.FlatBuffers.follow = lambda self, moved: None  # type: ignore[method-assign]

    def step(self, *, before: Callable[[], Any] = lambda: None) -> None:
        self.optimizer.zero_grad()
        backward(self.model, torch.randn(2, 6, 4, generator=self._apart))
        before()
        self.optimizer.step()

    def flush(self) -> None:
        self._flush(self._engine)

    def stale(self, read: Read, *, gradients: bool = False) -> bool:
        """Whether a value in flight is another one than after everything has landed."""
        found: list[Tensor] = []

        def look() -> None:
            self.model.train()
            found.append(read(self.model, self.optimizer).detach().clone())

        def twice() -> None:
            look()
            self.flush()
            look()

        self._gate.shut()
        if gradients:
            self.step(before=twice)
            self.flush()
        else:
            self.step()
            twice()
        return not torch.equal(*found)

    def stale_kept(self, take: Callable[[Zoo], Any], read: Callable[[Any], Tensor]) -> bool:
        """The same of what was taken before ``step()``."""
        kept = take(self.model)
        return self.stale(lambda model, optimizer: read(kept))

    def lost(self, write: Write, *, gradients: bool = False) -> bool:
        """Whether training goes on otherwise than on one rank alone, given the same data."""
        alone = copy.deepcopy(self.model)
        optimizer = torch.optim.Adam(alone.parameters(), lr=0.01)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        for number in range(3):
            x = torch.randn(2, 6, 4, generator=self._alike)
            if not number:
                self._gate.shut()
            for model, its_own in ((self.model, self.optimizer), (alone, optimizer)):
                its_own.zero_grad()
                backward(model, x)
                if gradients and not number:
                    write(model, its_own)
                its_own.step()
                if not gradients and not number:
                    write(model, its_own)
            self.flush()
        same = torch.equal(flat(self.model.parameters()), flat(alone.parameters()))
        self.step()  # on other data on each rank
        self.flush()
        one, other = reads.gathered(flat(self.model.parameters())).chunk(2)
        same = same and torch.equal(one, other)
        with torch.no_grad():  # so that it neither grows nor dies
            for parameter, first in zip(
                self.model.parameters(), reads.build().parameters(), strict=True
            ):
                parameter.copy_(first)
        return not same


def backward(model: Zoo, x: Tensor) -> None:
    model(x).square().mean().backward()


def fly(guard_on: bool) -> Found:
    """By kind and name of a way to read or write, whether that went wrong on this rank."""
    flights = Flights(guard_on=guard_on)

    def of(ways: Mapping[str, Any], went_wrong: Callable[[Any], bool]) -> dict[str, bool]:
        return {name: went_wrong(way) for name, way in ways.items()}

    holes = of(reads.HOLES, flights.stale) if guard_on else {}
    found = {
        "holes": holes,
        "reads": of(reads.READS, flights.stale),
        "kept": of(reads.KEPT, lambda way: flights.stale_kept(*way)),
        "gradient reads": of(
            reads.GRADIENT_READS, lambda read: flights.stale(read, gradients=True)
        ),
        "writes": of(writes.WRITES, flights.lost),
        "gradient writes": of(
            writes.GRADIENT_WRITES, lambda write: flights.lost(write, gradients=True)
        ),
        "moves": of(writes.MOVES, flights.lost),
    }
    if guard_on:
        found["replaced"] = of(writes.REPLACED, lambda way: flights.lost(way, gradients=True))
        found["replaced later"] = of(writes.REPLACED, flights.lost)
    return found
