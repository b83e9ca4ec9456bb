"""The plans that may be tried, and which of them is selected: the fastest by measurement.

With two ranks no plan changes a number. With more, bucketing and method decide how sums are
rounded. So which plan is tried next follows from nothing but the trials before, and those are
remembered from one run to the next: the same steps are then trained with the same buckets.
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
"""Steps per trial; the first one, which starts with nothing in flight, is not timed."""
_NEAR = (0.25, 0.08)
"""Candidates within these fractions of the fastest are tried a second and a third time: single
steps of one plan can differ by a third."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to plan that may be tried.

    Args:
        bucketing_name: what its buckets are, in words.
        coarseness: of the usual bucketing; None for the buckets of ``DistributedDataParallel``.
        methods: by which buckets may be reduced, of those that may be used; all if empty.
        blocking: whether ``optimizer.step()`` waits for everything.
        margin: the fraction by which it must be faster than others to be selected.
        buckets: to use instead of making them.
        found: the whole plan, to use instead of making one.
    """

    bucketing_name: str
    coarseness: float | None = 1.0
    methods: tuple[str, ...] = ()
    blocking: bool = False
    margin: float = 0.0
    buckets: tuple[Bucket, ...] | None = None
    found: Plan | None = None

    @property
    def name(self) -> str:
        """Its name in words; no two candidates have the same."""
        return f"{self.bucketing_name}, waiting in step()" if self.blocking else self.bucketing_name

    def bucketing(
        self, flats: Sequence[Flat], network: Network, *, ranks: int, methods: Sequence[str]
    ) -> tuple[Bucket, ...]:
        """Makes its buckets; the arguments are those of ``planner.cut``."""
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
        """Makes the plan; the arguments are those of ``planner.make_plan``."""
        if self.found is not None:
            return self.found
        buckets = self.bucketing(flats, network, ranks=ranks, methods=methods)
        if self.blocking:
            ops = backward_order(flats, buckets)
        else:
            ops = order(trace, flats, buckets, network.slowed(pace), ranks=ranks, window=window)
        return Plan(ranks, tuple(flats), buckets, ops, window, self.blocking)


_COARSER_MARGIN = 0.02
"""Coarser buckets must win by this: on a slower network, finer ones would be needed again."""

LIKE_DDP = Candidate("DDP's buckets", None, blocking=True)
"""Does what takes time in ``DistributedDataParallel``: its buckets, waited for in ``step()``."""
SEARCHED = Candidate("the searched plan")
"""Stands for the plan of which all is chosen together, by a search with measured times."""
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
    """Puts a plan that was found in the place of ``SEARCHED``, or nothing if none was."""
    found = () if plan is None else (replace(SEARCHED, buckets=plan.buckets, found=plan),)
    return tuple(one for c in candidates for one in (found if c == SEARCHED else (c,)))


def of_equal_numbers(candidate: Candidate, buckets: tuple[Bucket, ...]) -> tuple[Candidate, ...]:
    """The candidates that change no number: with these buckets, waited for in ``step()`` or not."""
    return tuple(
        replace(candidate, blocking=blocking, margin=0.0, buckets=buckets, found=None)
        for blocking in (False, True)
    )


def distinct(
    candidates: Sequence[Candidate], buckets_of: Mapping[Candidate, tuple[Bucket, ...]]
) -> tuple[Candidate, ...]:
    """Leaves out candidates that make the same buckets as one before them."""
    first = {(buckets_of[c], c.blocking): c for c in reversed(candidates) if c in buckets_of}
    return tuple(
        c for c in candidates if c not in buckets_of or first[buckets_of[c], c.blocking] is c
    )


class Trial(NamedTuple):
    """Some steps under one candidate.

    Args:
        name: of the candidate.
        step_s: how long they took, seconds.
    """

    name: str
    step_s: tuple[float, ...]

    def __repr__(self) -> str:
        took = f"{median(self.step_s) * 1e3:.3g} ms a step" if self.step_s else "not timed"
        return f"Trial({self.name}, {took})"


def trials_of(data: Any) -> list[Trial]:
    """Reads trials that were kept as JSON; none if they are no longer readable."""
    try:
        trials = [Trial(str(name), tuple(map(float, step_s))) for name, step_s in data]
    except (TypeError, ValueError):
        return []
    return trials if all(trial.step_s for trial in trials) else []


def next_trial(trials: Sequence[Trial], candidates: Sequence[Candidate]) -> tuple[Candidate, bool]:
    """Which candidate to go on with, and whether it is selected.

    Each is tried once. Those that came near to the fastest, in one step or in most, are tried
    again, and the nearest a third time.

    Args:
        trials: so far.
        candidates: the usual one first.
    """
    step_s = {
        c: [s for trial in trials if trial.name == c.name for s in trial.step_s] for c in candidates
    }
    for candidate, taken in step_s.items():
        if not taken:
            return candidate, False
    least_s = [min(how(taken) for taken in step_s.values()) for how in (min, median)]
    had = {c: sum(trial.name == c.name for trial in trials) for c in candidates}
    near = list(candidates)
    for number, fraction in enumerate(_NEAR, 1):
        near = [
            c
            for c in near
            if min(step_s[c]) < (1 + fraction) * least_s[0]
            or median(step_s[c]) < (1 + fraction) * least_s[1]
        ]
        behind = [c for c in near if had[c] <= number]
        if len(near) > 1 and behind:
            return behind[0], False
    return min(near, key=lambda c: median(step_s[c]) / (1 - c.margin)), True


def reason_for(selected: Candidate, trials: Sequence[Trial]) -> str:
    """Says in words why a candidate is selected."""
    taken: dict[str, list[float]] = {}
    for trial in trials:
        taken.setdefault(trial.name, []).extend(trial.step_s)
    shown = {name: f"{median(step_s) * 1e3:.3g} ms" for name, step_s in taken.items()}
    own = shown.pop(selected.name)
    others = ", ".join(f"{name} {ms}" for name, ms in shown.items())
    return f"{selected.name} takes {own} a step" + (f" ({others})" if others else "")
