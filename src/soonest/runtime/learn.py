"""Plans from what the first steps show."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from soonest.core.network import Network
from soonest.core.plan import Plan
from soonest.core.planner import make_plan
from soonest.core.trace import Trace
from soonest.runtime import collectives
from soonest.runtime.agree import agree_on_plan
from soonest.runtime.engine import Engine
from soonest.runtime.layout import Layout
from soonest.runtime.profile import Record, rate_of, trace_of, typical

_WARM_STEPS = 4
"""The first step shows the order of the layers; only warm ones show their times."""


class Learner:
    """Makes a plan after the first step, and once more after a few warm ones.

    All ranks call it after the same steps and take the first rank's measurements, so they plan
    alike.

    Args:
        network: what combining costs on this group.
        window: how many ops may be in flight.
    """

    def __init__(self, network: Network, window: int) -> None:
        self._network = network
        self._window = window
        self._steps = 0
        self._traces: list[Trace] = []
        self._rates: list[float] = []
        self._before: Record | None = None

    def __call__(self, engine: Engine) -> None:
        """To be called after every step that used combined gradients."""
        self._steps += 1
        if self._steps == 1:
            self._first(engine)
        elif self._steps <= _WARM_STEPS + 1:
            if self._before is not None and self._before.complete:
                self._traces.append(self._trace(engine, self._before, self._before))
                self._note_rate(engine, self._before)
            self._before = engine.record
            if self._steps == _WARM_STEPS + 1:
                self._again(engine)

    def _first(self, engine: Engine) -> None:
        trace = self._trace(engine, engine.record, engine.observed)
        engine.flush()
        self._note_rate(engine, engine.record)
        members = engine.layout.members
        order = [members[index].name for index in engine.observed.first_use()]
        trace, order = self._first_rank(engine, trace, order)
        assert trace is not None
        same = order == [member.name for member in members]
        self._bind(engine, engine.layout if same else Layout(engine.model, order), trace)

    def _again(self, engine: Engine) -> None:
        trace, _ = self._first_rank(engine, typical(self._traces) if self._traces else None, [])
        if trace is not None:
            self._bind(engine, engine.layout, trace)

    def _note_rate(self, engine: Engine, record: Record) -> None:
        rate = rate_of(record, engine.program.plan)
        if rate is not None:
            self._rates.append(rate)

    def _trace(self, engine: Engine, backward: Record, forward: Record) -> Trace:
        return trace_of(backward, forward, engine.layout.members, model=type(engine.model).__name__)

    def _first_rank(
        self, engine: Engine, trace: Trace | None, order: Sequence[str]
    ) -> tuple[Trace, list[str]]:
        engine.flush()  # nothing else may be on the group now
        mine = (trace and trace.to_json(), list(order))
        measured, order = collectives.first_rank_object(engine.group, mine)
        return measured and Trace.from_json(measured), list(order)

    def _plan(self, engine: Engine, layout: Layout, trace: Trace) -> Plan:
        network = self._network
        if self._rates:  # under the real load, and past what short tests can get through at once
            network = Network(network.latency_s, median(self._rates))
        ranks = engine.group.size()
        return make_plan(trace, layout.flats, network, ranks=ranks, window=self._window)

    def _bind(self, engine: Engine, layout: Layout, trace: Trace) -> None:
        mine = self._plan(engine, layout, trace).to_json() if engine.group.rank() == 0 else None
        plan = Plan.from_json(collectives.first_rank_object(engine.group, mine))
        agree_on_plan(engine.group, plan)
        engine.bind(layout, plan)
