"""The plans that take turns, and which of them stays: the fastest by measurement.

With two ranks no plan changes a number. With more, cut and method decide how sums are rounded. So
which plan has a turn follows from nothing but the turns before it, and those are remembered from
one run to the next: the same steps are then trained under the same cuts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

from soonest.core.cost import Network
from soonest.core.plan import Bucket, Flat, Plan
from soonest.core.planner.ddp_buckets import make_ddp_buckets
from soonest.core.planner.planner import PARTS, backward_order, make_buckets, order
from soonest.core.trace import Trace

STEPS = 4
"""Of a turn. The first one starts with nothing in flight, and does not count."""
_NEAR = (0.25, 0.08)
"""Candidates that come this near to the fastest have a second turn, and a third one: single steps
of one plan can differ by a third."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that may stay.

    Args:
        cut_name: of its buckets, in words.
        coarseness: of the usual cut; None for the buckets of ``DistributedDataParallel``.
        methods: by which it may combine, of those that may be used; all of them if empty.
        blocking: whether ``optimizer.step()`` waits for everything.
        margin: by which share it must be faster than others to stay instead of them.
        buckets: to take instead of making them.
        found: the whole plan, to take instead of making one.
    """

    cut_name: str
    coarseness: float | None = 1.0
    methods: tuple[str, ...] = ()
    blocking: bool = False
    margin: float = 0.0
    buckets: tuple[Bucket, ...] | None = None
    found: Plan | None = None

    @property
    def name(self) -> str:
        """It in words, unique."""
        return f"{self.cut_name}, waiting in step()" if self.blocking else self.cut_name

    def cut(
        self, flats: Sequence[Flat], network: Network, *, ranks: int, methods: Sequence[str]
    ) -> tuple[Bucket, ...]:
        """Its buckets; the arguments are those of ``planner.cut``."""
        if self.buckets is not None:
            return self.buckets
        methods = [m for m in self.methods if m in methods] or methods
        if self.coarseness is None:
            return make_ddp_buckets(flats, network, methods=methods)
        return make_buckets(
            flats, network, ranks=ranks, methods=methods, coarseness=self.coarseness
        )

    def plan(
        self,
        trace: Trace,
        flats: Sequence[Flat],
        network: Network,
        *,
        ranks: int,
        window: int,
        methods: Sequence[str],
        pace: float,
    ) -> Plan:
        """The plan itself; the arguments are those of ``planner.make_plan``."""
        if self.found is not None:
            return self.found
        buckets = self.cut(flats, network, ranks=ranks, methods=methods)
        if self.blocking:
            ops = backward_order(flats, buckets)
        else:
            ops = order(trace, flats, buckets, network.slowed(pace), ranks=ranks, window=window)
        return Plan(ranks, tuple(flats), buckets, ops, window, self.blocking)


_COARSER_MARGIN = 0.02
"""A coarser cut gives away what a slower network will ask for."""

LIKE_DDP = Candidate("DDP's buckets", None, blocking=True)
"""In all that takes time, ``DistributedDataParallel``."""
SEARCHED = Candidate("the searched plan")
"""Stands for one whose cut, methods, order and window are chosen together, by measured times."""
CANDIDATES = (
    Candidate("the usual cut"),
    LIKE_DDP,
    SEARCHED,
    # Methods are chosen by what they cost on an idle network.
    Candidate("the usual cut for all-reduce alone", methods=("allreduce",)),
    # Where the network is fast, fewer ops cost the processors less than they delay.
    Candidate("4 times as coarse", 4.0, margin=_COARSER_MARGIN),
    Candidate("two buckets", PARTS, margin=_COARSER_MARGIN),
    Candidate("one bucket", math.inf, margin=_COARSER_MARGIN),
)


def with_searched(candidates: Sequence[Candidate], plan: Plan | None) -> tuple[Candidate, ...]:
    """The candidates with this plan in the place of ``SEARCHED``, or with none there."""
    found = () if plan is None else (replace(SEARCHED, buckets=plan.buckets, found=plan),)
    return tuple(one for c in candidates for one in (found if c == SEARCHED else (c,)))


def of_equal_numbers(candidate: Candidate, buckets: tuple[Bucket, ...]) -> tuple[Candidate, ...]:
    """What may take turns with a candidate without changing a number: its buckets stay."""
    return tuple(
        replace(candidate, blocking=blocking, margin=0.0, buckets=buckets, found=None)
        for blocking in (False, True)
    )


def distinct(
    candidates: Sequence[Candidate], cuts: Mapping[Candidate, tuple[Bucket, ...]]
) -> tuple[Candidate, ...]:
    """Those that do not make the same buckets as one before them, or are not in ``cuts``."""
    first = {(cuts[c], c.blocking): c for c in reversed(candidates) if c in cuts}
    return tuple(c for c in candidates if c not in cuts or first[cuts[c], c.blocking] is c)


class Trial(NamedTuple):
    """Some steps under one candidate.

    Args:
        name: of the candidate.
        step_s: how long they took, seconds.
    """

    name: str
    step_s: tuple[float, ...]


def turns_of(data: Any) -> list[Trial]:
    """Turns that were kept as JSON; none if they are no longer readable."""
    try:
        turns = [Trial(str(name), tuple(map(float, step_s))) for name, step_s in data]
    except (TypeError, ValueError):
        return []
    return turns if all(turn.step_s for turn in turns) else []


def next_turn(turns: Sequence[Trial], candidates: Sequence[Candidate]) -> tuple[Candidate, bool]:
    """Who has the next turn, and whether it stays.

    Each has one. Those that came near to the fastest, in one step or in most, have another, and the
    nearest a third one.

    Args:
        turns: so far.
        candidates: the usual one first.
    """
    step_s = {
        c: [s for turn in turns if turn.name == c.name for s in turn.step_s] for c in candidates
    }
    for candidate, taken in step_s.items():
        if not taken:
            return candidate, False
    least_s = [min(how(taken) for taken in step_s.values()) for how in (min, median)]
    had = {c: sum(turn.name == c.name for turn in turns) for c in candidates}
    near = list(candidates)
    for number, share in enumerate(_NEAR, 1):
        near = [
            c
            for c in near
            if min(step_s[c]) < (1 + share) * least_s[0]
            or median(step_s[c]) < (1 + share) * least_s[1]
        ]
        behind = [c for c in near if had[c] <= number]
        if len(near) > 1 and behind:
            return behind[0], False
    return min(near, key=lambda c: median(step_s[c]) / (1 - c.margin)), True


def told(turns: Sequence[Trial], stays: Candidate) -> str:
    """Why a candidate stays, in words."""
    taken: dict[str, list[float]] = {}
    for turn in turns:
        taken.setdefault(turn.name, []).extend(turn.step_s)
    shown = {name: f"{median(step_s) * 1e3:.3g} ms" for name, step_s in taken.items()}
    own = shown.pop(stays.name)
    others = ", ".join(f"{name} {ms}" for name, ms in shown.items())
    return f"{stays.name} takes {own} a step" + (f" ({others})" if others else "")
