"""Plans from what the first steps show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TypeVar

from soonest.core.network import Network
from soonest.core.plan import Plan
from soonest.core.planner import PARTS, make_plan
from soonest.core.trace import Trace
from soonest.runtime import collectives
from soonest.runtime.agree import agree_on_plan
from soonest.runtime.engine import Engine
from soonest.runtime.layout import Layout
from soonest.runtime.profile import Record, now_s, pace_of, trace_of, typical

_WARM_STEPS = 4
"""The first step shows the order of the layers; only warm ones show their times."""

_CUTS = (1.0, 4.0, PARTS, math.inf)
"""Cuts that two ranks try, as factors of the usual one. Where the network is fast, fewer ops cost
the processors less than they delay."""
_NEAR = 0.25
"""Cuts that come this near to the fastest have more turns."""
_TURNS = 3
"""So many of them: single steps of one plan can differ by a third."""
_MARGIN = 0.02
"""A coarser cut must be faster by this: it gives away what a slower network will ask for."""


_T = TypeVar("_T")


def next_cut(step_s: Mapping[float, Sequence[float]]) -> tuple[float, bool]:
    """The coarseness to go on with, and whether it stays.

    Args:
        step_s: how long steps took, seconds, by coarseness.
    """
    for cut in _CUTS:
        if cut not in step_s:
            return cut, False
    least_s = min(min(taken) for taken in step_s.values())
    near = [cut for cut in _CUTS if min(step_s[cut]) < (1 + _NEAR) * least_s]
    least_tried = min(near, key=lambda cut: len(step_s[cut]))
    if len(near) > 1 and len(step_s[least_tried]) < _TURNS * (_WARM_STEPS - 1):
        return least_tried, False
    typical_s = {cut: median(taken) for cut, taken in step_s.items()}
    best = min(near, key=typical_s.__getitem__)
    return (best if typical_s[best] < (1 - _MARGIN) * typical_s[1.0] else 1.0), True


class Learner:
    """Makes a plan after the first step, and once more after a few warm ones.

    With two ranks, coarser plans then take turns with it, and the fastest stays. With more the cut
    decides how sums are rounded, and must not depend on measurements.

    All ranks call it after the same steps and take the first rank's decisions, so they plan alike.

    Args:
        network: what combining costs on this group.
        window: how many ops may be in flight.
        methods: that the plans may use.
    """

    def __init__(self, network: Network, *, window: int, methods: Sequence[str]) -> None:
        self._network = network
        self._window = window
        self._methods = methods
        self._steps = 0
        self._traces: list[Trace] = []
        self._paces: list[float] = []
        self._before: Record | None = None
        self._tried: float | None = None
        self._ended_s: list[float] = []
        self._step_s: dict[float, list[float]] = {}

    def __call__(self, engine: Engine) -> None:
        """To be called after every step that used combined gradients."""
        if engine.settled:
            return
        self._steps += 1
        if self._steps == 1:
            self._first(engine)
            return
        if self._tried is None:
            self._note(engine)
        self._ended_s.append(now_s())
        if len(self._ended_s) == _WARM_STEPS:
            self._turn_ends(engine)

    def _turn_ends(self, engine: Engine) -> None:
        """Goes on with the plan to try next, or with the one that stays."""
        if self._tried is not None:
            taken = [end - start for start, end in pairwise(self._ended_s)]
            self._step_s.setdefault(self._tried, []).extend(taken)
        self._ended_s = []
        engine.attention.learning = False
        trace = typical(self._traces).to_json() if self._traces else None
        mine = (trace, next_cut(self._step_s) if engine.ranks.group.size() == 2 else (1.0, True))
        trace, (self._tried, engine.settled) = self._first_rank(engine, mine)
        if trace is not None:
            engine.complete()
            self._bind(engine, engine.layout, Trace.from_json(trace), self._tried)

    def _first(self, engine: Engine) -> None:
        engine.attention.learning = True
        trace = self._trace(engine, engine.record, engine.observed)
        engine.complete()
        self._note_pace(engine, engine.record)
        members = engine.layout.members
        order = [members[index].name for index in engine.observed.first_use()]
        trace, order = self._first_rank(engine, (trace.to_json(), order))
        same = order == [member.name for member in members]
        layout = engine.layout if same else Layout(engine.model, order)
        self._bind(engine, layout, Trace.from_json(trace), 1.0)

    def _note(self, engine: Engine) -> None:
        if self._before is not None and self._before.complete:
            self._traces.append(self._trace(engine, self._before, self._before))
            self._note_pace(engine, self._before)
        self._before = engine.record

    def _note_pace(self, engine: Engine, record: Record) -> None:
        pace = pace_of(record, engine.program.plan, self._network)
        if pace:
            self._paces.append(pace)

    def _trace(self, engine: Engine, backward: Record, forward: Record) -> Trace:
        return trace_of(backward, forward, engine.layout.members, model=type(engine.model).__name__)

    def _first_rank(self, engine: Engine, mine: _T) -> _T:
        engine.flush()  # nothing else may be on the group now
        return collectives.first_rank_object(engine.ranks.group, mine)

    def _plan(self, engine: Engine, layout: Layout, trace: Trace, coarseness: float) -> Plan:
        return make_plan(
            trace,
            layout.flats,
            self._network,
            ranks=engine.ranks.group.size(),
            window=self._window,
            methods=self._methods,
            coarseness=coarseness,
            # Under the real load, and past what short tests can get through at once.
            pace=median(self._paces) if self._paces else 1.0,
        )

    def _bind(self, engine: Engine, layout: Layout, trace: Trace, coarseness: float) -> None:
        first = engine.ranks.group.rank() == 0
        mine = self._plan(engine, layout, trace, coarseness).to_json() if first else None
        plan = Plan.from_json(collectives.first_rank_object(engine.ranks.group, mine))
        agree_on_plan(engine.ranks.group, plan)
        engine.bind(layout, plan)
