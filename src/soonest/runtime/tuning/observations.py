"""What steps that were watched closely show of the model and of the network under load."""

from __future__ import annotations

from statistics import median

from soonest.core.cost import Network
from soonest.core.trace import Trace
from soonest.runtime.engine.engine import Engine
from soonest.runtime.timing.step_record import Record
from soonest.runtime.timing.trace import pace_of, trace_of, typical


class Observations:
    """Collects traces of the model and paces of the network from the records of steps.

    Args:
        network: what ops cost on it, as calibrated.

    Attributes:
        trace: the model as it is known so far; None before the first step.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.trace: Trace | None = None
        self.forget()

    def __repr__(self) -> str:
        return f"Observations({len(self._traces)} traces, pace {self.pace:.3g})"

    def forget(self) -> None:
        """Forgets the traces and paces, but keeps ``trace`` until there is a better one."""
        self._traces: list[Trace] = []
        self._paces: list[float] = []
        self._before: Record | None = None

    @property
    def pace(self) -> float:
        """How many times as long as on the calibrated network ops take under the real load.

        It is measured past what short tests can get through at once.
        """
        return median(self._paces) if self._paces else 1.0

    def warm_up(self, engine: Engine) -> None:
        """Takes in a step of which nothing counts but, perhaps, its forward pass."""
        self._before = engine.profiler.record

    def first_step(self, engine: Engine) -> None:
        """Takes in the step that shows the order of use, and completes it."""
        profiler = engine.profiler
        forward = self._before or profiler.observed
        self.trace = _trace_of(
            engine, profiler.record, forward if forward.complete else profiler.observed
        )
        self._before = None
        engine.complete()
        self._note_pace(engine, profiler.record)

    def step(self, engine: Engine) -> None:
        """Takes in the step before the one that ends now: its times are known by now."""
        if self._before is not None and self._before.complete:
            self._traces.append(_trace_of(engine, self._before, self._before))
            self._note_pace(engine, self._before)
        self._before = engine.profiler.record

    def conclude(self) -> None:
        """Makes ``trace`` the median of what was observed, if anything was."""
        if self._traces:
            self.trace = typical(self._traces)

    def _note_pace(self, engine: Engine, record: Record) -> None:
        pace = pace_of(record, engine.bound_plan.plan, self._network)
        if pace:
            self._paces.append(pace)


def _trace_of(engine: Engine, backward: Record, forward: Record) -> Trace:
    return trace_of(backward, forward, engine.layout.params, model=type(engine.model).__name__)
