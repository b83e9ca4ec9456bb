"""Plans from what the steps show, while training for real."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.runtime import comm
from soonest.runtime.agreement import agree_on_plan
from soonest.runtime.device.clock import Ends, now_s
from soonest.runtime.engine.engine import Engine
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.timing.spans import span
from soonest.runtime.tuning import plan_file
from soonest.runtime.tuning.candidates import STEPS
from soonest.runtime.tuning.drift import Drift
from soonest.runtime.tuning.observations import Observations
from soonest.runtime.tuning.phase import Phase, PhaseHistory
from soonest.runtime.tuning.trial_cache import SavedPlan, TrialCache
from soonest.runtime.tuning.trials import EXACT_RANKS, Trials

_WARM_UP = 3
"""Steps of a device of which nothing is learned."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Decision(NamedTuple):
    """A decision of the first rank, as it tells the others.

    Args:
        plan: to go on with, as JSON.
        why: in words.
        selected: whether it is the last for now.
    """

    plan: dict[str, Any]
    why: str
    selected: bool


class AutoTuner:
    """Tries several plans while training, and selects the fastest; see ``Phase`` for how.

    When steps have come to take another time for good, they are observed and plans tried again,
    ever more rarely.

    With more than two ranks bucketing and method decide how sums are rounded. So trials are
    remembered from one run to the next, and what a run has measured counts in all that follow it;
    so is the plan that was searched for by measured times. Training that is resumed goes on with
    the plan that was selected, without trials. Where nothing can be remembered, and when steps have
    changed, only such candidates are tried as do not change a number: the same buckets, waited for
    in ``step()`` or not.

    All ranks call it after the same steps and take the first rank's decisions, so they plan alike.

    Args:
        network: what reducing costs on this group.
        window: how many ops may be in flight.
        methods: that the plans may use.
        ranks: how many.
        job: what tells this training from others on the same network, as JSON.
    """

    def __init__(
        self,
        network: Network,
        *,
        window: int,
        methods: Sequence[str],
        ranks: int,
        job: Mapping[str, Any],
    ) -> None:
        self._job = {**job, "ranks": ranks, "window": window, "network": network.to_json()}
        self._network = network
        self._window = window
        self._methods = methods
        self._ranks = ranks
        self._steps = 0
        self._history = PhaseHistory()

    def __repr__(self) -> str:
        return f"AutoTuner({self.phase.value} at step {self._steps}, {self._trials!r})"

    @property
    def phase(self) -> Phase:
        """The present phase."""
        return self._history.phase

    def start_with(self, layout: FlatBuffers) -> None:
        """Prepares for parameters of which nothing is known yet."""
        self._plans = 0
        self._named: str | None = None
        self._warming = _WARM_UP
        self._ended_s: list[float] = []
        self._drift, self._ends = Drift(), None
        self._seen = Observations(self._network)
        self._cache = TrialCache({**self._job, "flats": [asdict(flat) for flat in layout.flats]})
        self._trials = Trials(
            self._network,
            window=self._window,
            methods=self._methods,
            ranks=self._ranks,
            seen=self._seen,
            cache=self._cache,
        )

    def start_over(self, engine: Engine, *, selected: bool) -> None:
        """Prepares for other parameters, with the plan that is bound now.

        Args:
            engine: which trains them.
            selected: that plan is the last one, as the user has given it.
        """
        self.start_with(engine.layout)
        engine.profiler.attention.learning = False
        why = "other parameters are trained from now on, so plan anew"
        self._enter(Phase.WARM_UP, engine, why)
        if selected:
            self._enter(Phase.SETTLED, engine, "the plan was given")
        self._note_switch(engine, why)

    def _enter(self, phase: Phase, engine: Engine, why: str) -> None:
        """Goes on to another phase; see ``PhaseHistory.enter``."""
        self._history.enter(phase, self._steps, why)
        engine.settled = phase is Phase.SETTLED
        self._ended_s = []

    def __call__(self, engine: Engine) -> None:
        """Takes in a step; to be called after each that used reduced gradients."""
        if self.phase is Phase.WARM_UP and self._warming and engine.lane.clock is not None:
            self._warming -= 1
            self._seen.warm_up(engine)
            engine.profiler.attention.learning = True
            return
        self._steps += 1
        match self.phase:
            case Phase.WARM_UP:
                self._first(engine)
            case Phase.OBSERVE:
                self._seen.step(engine)
                if (step_s := self._timed(engine)) is not None:
                    self._observed(engine, step_s)
            case Phase.TRIALS:
                if (step_s := self._timed(engine)) is not None:
                    self._tried(engine, step_s)
            case Phase.SETTLED:
                if self._drift.ended(*self._known_ends(engine)):
                    self._compare(engine)

    def _timed(self, engine: Engine) -> tuple[float, ...] | None:
        """How long the last steps took, seconds, once they are as many as belong together."""
        clock = engine.lane.clock
        self._ended_s.append(now_s() if clock is None else clock.now())
        if len(self._ended_s) < STEPS:
            return None
        ended_s = self._ended_s if clock is None else clock.seconds(self._ended_s)
        self._ended_s = []
        return tuple(end - start for start, end in pairwise(ended_s))

    def _known_ends(self, engine: Engine) -> Sequence[float]:
        """End times of steps: the last one's or, of a device, those that it has got through."""
        clock = engine.lane.clock
        if clock is None:
            return (now_s(),)
        if self._ends is None:
            self._ends = Ends(clock)
        return self._ends.step()

    # Training that is resumed

    def resume(self, engine: Engine, *, resumed: bool = True) -> None:
        """Goes on with the plan that an earlier run has selected; a collective call.

        So training that is resumed rounds sums as if it had never stopped.

        Args:
            engine: of the training.
            resumed: whether it is; what the first rank says counts.
        """
        if engine.settled or self._ranks <= EXACT_RANKS:
            return
        mine = self._saved_plan(engine) if resumed and engine.ranks.group.rank() == 0 else None
        saved = self._first_rank(engine, mine)
        if saved is None:
            return
        engine.complete()
        layout, plan = engine.layout.in_order(saved.order), Plan.from_json(saved.plan)
        agree_on_plan(engine.ranks.talk, plan)
        engine.profiler.attention.learning = False
        engine.bind(layout, plan)
        self._select(engine, plan, "as selected before, since training is resumed")

    def _saved_plan(self, engine: Engine) -> SavedPlan | None:
        """The plan that an earlier run has selected, if it was of this training."""
        saved = self._cache.saved_plan()
        if saved is None:
            return None
        plan, layout = Plan.from_json(saved.plan), engine.layout.in_order(saved.order)
        return saved if plan_file.fits(plan, layout, self._ranks) else None

    # The end of each phase

    def _first(self, engine: Engine) -> None:
        """Lays the buffers out in the order of use that the first step has shown."""
        engine.profiler.attention.learning = True
        self._seen.first_step(engine)
        order = engine.profiler.observed.first_use()
        mine = [engine.layout.params[index].name for index in order]
        layout = engine.layout.in_order(self._first_rank(engine, mine))
        if engine.ranks.group.rank() == 0:
            self._trials.choose_candidates(layout, engine.inputs)
        why = "the first step showed the order of use"
        self._go_on(engine, layout, why, selected=False)
        self._enter(Phase.OBSERVE, engine, why)

    def _observed(self, engine: Engine, step_s: tuple[float, ...]) -> None:
        """Begins the trials, with what the observed steps have shown."""
        engine.profiler.attention.learning = False
        if engine.ranks.group.rank() == 0:
            self._trials.begin(engine.layout)
        self._enter(Phase.TRIALS, engine, f"{len(step_s) + 1} steps were observed")
        self._next_trial(engine)

    def _tried(self, engine: Engine, step_s: tuple[float, ...]) -> None:
        """Goes on with the next trial, or with the plan that is selected."""
        if engine.ranks.group.rank() == 0:
            self._trials.note(step_s)
        self._next_trial(engine)

    def _next_trial(self, engine: Engine) -> None:
        selected, why = self._trials.next() if engine.ranks.group.rank() == 0 else (False, "")
        self._go_on(engine, engine.layout, why, selected=selected)

    def _compare(self, engine: Engine) -> None:
        """Observes steps anew if they have come to take another time."""
        factor = self._first_rank(engine, self._drift.factor)
        if factor is None:
            return
        why = f"steps take {factor:.2f} times as long as before, so plan anew"
        self._note_switch(engine, why)
        self._trials.start_over(engine.bound_plan.plan.buckets)
        self._seen.forget()
        engine.profiler.attention.learning = True
        self._enter(Phase.OBSERVE, engine, why)

    # Plans

    def _go_on(self, engine: Engine, layout: FlatBuffers, why: str, *, selected: bool) -> None:
        """Continues with the first rank's plan; a collective call."""
        with span(lambda: f"plan anew: {self._trials.now.name}"):
            engine.complete()
            mine = None
            if engine.ranks.group.rank() == 0:
                mine = _Decision(self._trials.plan(layout).to_json(), why, selected)
            decision = self._first_rank(engine, mine)
            assert decision is not None
            plan = Plan.from_json(decision.plan)
            self._named = self._named or engine.bound_plan.plan.fingerprint[:8]
            agree_on_plan(engine.ranks.talk, plan)
            engine.bind(layout, plan)
            if decision.selected:
                self._select(engine, plan, decision.why)
                if engine.ranks.group.rank() == 0 and self._ranks > EXACT_RANKS:
                    order = [param.name for param in engine.layout.params]
                    self._cache.keep_plan(SavedPlan(order, decision.plan))
            elif self.phase is Phase.WARM_UP:
                self._name(engine, plan, decision.why)
            else:
                self._history.note(self._steps, decision.why)

    def _select(self, engine: Engine, plan: Plan, why: str) -> None:
        """Keeps to the plan that is bound now."""
        self._name(engine, plan, why)
        self._enter(Phase.SETTLED, engine, why)
        self._drift, self._ends = Drift(plans=self._plans), None
        self._plans += 1

    def _name(self, engine: Engine, plan: Plan, why: str) -> None:
        """Tells the user of the plan that is bound now."""
        before, self._named = self._named, plan.fingerprint[:8]
        beside = " stays" if self._named == before else f" instead of {before}" if before else ""
        self._note_switch(engine, f"plan {self._named}{beside}: {why}")

    def _note_switch(self, engine: Engine, what: str) -> None:
        text = f"step {self._steps}: {what}"
        engine.history.append(text)
        if engine.ranks.group.rank() == 0:
            _log.info(text)

    def _first_rank(self, engine: Engine, mine: _T) -> _T:
        """The first rank's value; a collective call."""
        engine.flush()  # nothing else may be on the group now
        return comm.first_rank_object(engine.ranks.talk, mine)
