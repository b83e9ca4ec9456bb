"""Plans from what the steps show, while training for real."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, TypeVar

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.planner.planner import best_plan
from soonest.core.trace import Trace
from soonest.runtime import comm
from soonest.runtime.agreement import agree_on_plan
from soonest.runtime.device.clock import Ends, now_s
from soonest.runtime.engine.engine import Engine
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.timing.spans import span
from soonest.runtime.timing.step_record import Record
from soonest.runtime.timing.trace import pace_of, trace_of, typical
from soonest.runtime.tuning import plan_file
from soonest.runtime.tuning.candidates import (
    CANDIDATES,
    SEARCHED,
    STEPS,
    Candidate,
    Trial,
    distinct,
    next_turn,
    of_equal_numbers,
    told,
    with_searched,
)
from soonest.runtime.tuning.drift import Drift
from soonest.runtime.tuning.trial_cache import SavedPlan, TrialCache

_EXACT_RANKS = 2
"""So many ranks add up alike under any cut."""

_WARM_UP = 3
"""Steps of a device of which nothing is learned."""

_log = logging.getLogger("soonest")
_T = TypeVar("_T")


class _Decision(NamedTuple):
    """What the first rank tells all others.

    Args:
        plan: to go on with, as JSON.
        why: in words.
        stays: whether it is the last for now.
    """

    plan: dict[str, Any]
    why: str
    stays: bool


class AutoTuner:
    """Makes a plan after the first step, lets it take turns with others, and goes on with the best.

    The first step shows in which order parameters are used, a few warm ones how long layers take.
    Then the candidates take turns of a few steps each, and the fastest stays. From then on it only
    watches how long steps take. When they have changed for good, all but the first step is done
    again, ever more rarely.

    With more than two ranks cut and method decide how sums are rounded. So turns are remembered
    from one run to the next, and what a run has measured counts in all that follow it; so is the
    plan that was searched for by measured times. Training that is resumed goes on with what stayed,
    without turns. Where nothing can be remembered, and when steps have changed, only such
    candidates take turns as do not change a number: the same cut, waited for or not.

    All ranks call it after the same steps and take the first rank's decisions, so they plan alike.

    Args:
        network: what combining costs on this group.
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

    def start_with(self, layout: FlatBuffers) -> None:
        """Knows nothing yet of these parameters."""
        self._first_step = self._steps + 1
        self._plans = 0
        self._named: str | None = None
        self._traces: list[Trace] = []
        self._paces: list[float] = []
        self._before: Record | None = None
        self._warming = _WARM_UP
        self._observing = True
        self._ended_s: list[float] = []
        self._drift, self._ends = Drift(), None
        # Of these only the first rank knows.
        self._trace: Trace | None = None
        self._to_try: tuple[Candidate, ...] = CANDIDATES
        self._candidates: tuple[Candidate, ...] = ()
        self._now = CANDIDATES[0]
        self._turns: list[Trial] = []
        self._memory = TrialCache({**self._job, "flats": [asdict(flat) for flat in layout.flats]})

    def start_over(self, engine: Engine, *, stays: bool) -> None:
        """Other parameters are trained, with the plan that is bound now.

        Args:
            engine: which trains them.
            stays: that plan does.
        """
        self.start_with(engine.layout)
        engine.profiler.attention.learning = False
        engine.settled = stays
        self._note_switch(engine, "other parameters are trained from now on, so plan anew")

    def __call__(self, engine: Engine) -> None:
        """To be called after every step that used combined gradients."""
        if engine.lane.clock is not None and self._warming and not engine.settled:
            # A device's first steps are those in which memory is found and kernels are chosen.
            self._warming -= 1
            self._before = engine.profiler.record
            engine.profiler.attention.learning = True
            return
        self._steps += 1
        if engine.settled:
            if self._drift.ended(*self._known_ends(engine)):
                self._compare(engine)
            return
        if self._steps == self._first_step:
            self._first(engine)
            return
        if self._observing:
            self._note(engine)
        self._ended_s.append(now_s() if engine.lane.clock is None else engine.lane.clock.now())
        if len(self._ended_s) == STEPS:
            self._turn_ends(engine)

    def _known_ends(self, engine: Engine) -> Sequence[float]:
        """When steps ended, the last one or, of a device, those that it has got through."""
        clock = engine.lane.clock
        if clock is None:
            return (now_s(),)
        if self._ends is None:
            self._ends = Ends(clock)
        return self._ends.step()

    def resume(self, engine: Engine, *, resumed: bool = True) -> None:
        """Goes on with what stayed in an earlier run; a collective call.

        So training that is resumed rounds sums as if it had never stopped.

        Args:
            engine: of the training.
            resumed: whether it is; what the first rank says counts.
        """
        if engine.settled or self._ranks <= _EXACT_RANKS:
            return
        mine = self._choice(engine) if resumed and engine.ranks.group.rank() == 0 else None
        chosen = self._first_rank(engine, mine)
        if chosen is None:
            return
        engine.complete()
        layout, plan = self._layout(engine, chosen.order), Plan.from_json(chosen.plan)
        agree_on_plan(engine.ranks.talk, plan)
        engine.profiler.attention.learning = False
        engine.bind(layout, plan)
        self._stays(engine, plan, "as it stayed before, since training is resumed")

    def _choice(self, engine: Engine) -> SavedPlan | None:
        """What stayed in an earlier run, if it was of this training."""
        choice = self._memory.choice()
        if choice is not None:
            plan, layout = Plan.from_json(choice.plan), self._layout(engine, choice.order)
            return choice if plan_file.fits(plan, layout, self._ranks) else None
        return None

    @staticmethod
    def _layout(engine: Engine, order: Sequence[str]) -> FlatBuffers:
        same = list(order) == [param.name for param in engine.layout.params]
        return engine.layout if same else engine.layout.in_order(order)

    def _stays(self, engine: Engine, plan: Plan, why: str) -> None:
        """The plan in use is the last one for now."""
        self._name(engine, plan, why)
        engine.settled = True
        self._drift, self._ends = Drift(plans=self._plans), None
        self._plans += 1

    def _name(self, engine: Engine, plan: Plan, why: str) -> None:
        before, name = self._named, plan.fingerprint[:8]
        self._named = name
        beside = " stays" if name == before else f" instead of {before}" if before else ""
        self._note_switch(engine, f"plan {name}{beside}: {why}")

    def _first(self, engine: Engine) -> None:
        profiler = engine.profiler
        profiler.attention.learning = True
        forward = self._before or profiler.observed
        self._trace = self._trace_of(
            engine, profiler.record, forward if forward.complete else profiler.observed
        )
        self._before = None
        engine.complete()
        self._note_pace(engine, profiler.record)
        params = engine.layout.params
        mine = [params[index].name for index in profiler.observed.first_use()]
        layout = self._layout(engine, self._first_rank(engine, mine))
        if engine.ranks.group.rank() == 0:
            self._choose_candidates(engine, layout)
        self._go_on(engine, layout, "the first step showed the order of use", stays=False)

    def _turn_ends(self, engine: Engine) -> None:
        """Goes on with the plan to try next, or with the one that stays."""
        clock = engine.lane.clock
        ended_s = self._ended_s if clock is None else clock.seconds(self._ended_s)
        taken = tuple(end - start for start, end in pairwise(ended_s))
        self._ended_s = []
        engine.profiler.attention.learning = False
        why, stays = "", False
        if engine.ranks.group.rank() == 0:
            if not self._observing:
                self._had_turn(taken)
            else:
                self._take_in_what_was_observed(engine)
            self._now, stays = next_turn(self._turns, self._candidates)
            why = self._why() if stays else f"it is the turn of {self._now.name}"
        self._observing = False
        self._go_on(engine, engine.layout, why, stays=stays)

    def _take_in_what_was_observed(self, engine: Engine) -> None:
        if self._traces:
            self._trace = typical(self._traces)
        plan = self._searched(engine) if SEARCHED in self._to_try else None
        self._candidates = with_searched(self._to_try, plan)

    def _searched(self, engine: Engine) -> Plan | None:
        """The plan that a search finds, or found in an earlier run; None if the usual cut is it."""
        assert self._trace is not None
        searched = self._memory.searched
        if searched is None or not plan_file.fits(searched, engine.layout, self._ranks):
            searched = self._memory.searched = best_plan(
                self._trace,
                engine.layout.flats,
                self._network.slowed(self._pace()),
                ranks=self._ranks,
                methods=self._methods,
            )
            self._memory.keep_turns([])
        usual = self._plan(engine.layout, self._to_try[0])
        return None if searched.buckets == usual.buckets else searched

    def _compare(self, engine: Engine) -> None:
        """Learns anew if steps have changed."""
        factor = self._first_rank(engine, self._drift.factor)
        if factor is None:
            return
        self._note_switch(engine, f"steps take {factor:.2f} times as long as before, so plan anew")
        if self._ranks > _EXACT_RANKS:
            self._to_try = of_equal_numbers(self._now, engine.bound_plan.plan.buckets)
        self._memory.forget_turns()
        self._turns, self._traces, self._paces = [], [], []
        self._before = None
        self._observing = engine.profiler.attention.learning = True
        engine.settled = False

    def _choose_candidates(self, engine: Engine, layout: FlatBuffers) -> None:
        """Those of which any may stay, and what is known of them."""
        cuts = {
            candidate: candidate.cut(
                layout.flats, self._network, ranks=self._ranks, methods=self._methods
            )
            for candidate in CANDIDATES
            if candidate != SEARCHED
        }
        self._to_try = distinct(CANDIDATES, cuts)
        self._now = self._to_try[0]
        if self._ranks <= _EXACT_RANKS:
            return
        details = {
            "flats": [asdict(flat) for flat in layout.flats],
            "cuts": [[asdict(bucket) for bucket in buckets] for buckets in cuts.values()],
            "candidates": [candidate.name for candidate in self._to_try],
            "inputs": engine.inputs,
        }
        if not self._memory.recall_turns(details):
            self._to_try = of_equal_numbers(self._now, cuts[self._now])

    def _had_turn(self, step_s: tuple[float, ...]) -> None:
        """Takes note of a turn, or of what an earlier run measured in it."""
        number, known = len(self._turns), self._memory.turns
        if number < len(known) and known[number].name == self._now.name:
            self._turns.append(known[number])
            return
        self._turns.append(Trial(self._now.name, step_s))
        self._memory.turns = []
        self._memory.keep_turns(self._turns)

    def _why(self) -> str:
        remembered = " as remembered" if self._memory.turns == self._turns else ""
        return told(self._turns, self._now) + remembered

    def _go_on(self, engine: Engine, layout: FlatBuffers, why: str, *, stays: bool) -> None:
        """Continues with the first rank's plan; a collective call."""
        with span(lambda: f"plan anew: {self._now.name}"):
            self._bind_decided(engine, layout, why, stays=stays)

    def _bind_decided(self, engine: Engine, layout: FlatBuffers, why: str, *, stays: bool) -> None:
        engine.complete()
        mine = None
        if engine.ranks.group.rank() == 0:
            mine = _Decision(self._plan(layout, self._now).to_json(), why, stays)
        decision = self._first_rank(engine, mine)
        assert decision is not None
        plan = Plan.from_json(decision.plan)
        self._named = self._named or engine.bound_plan.plan.fingerprint[:8]
        agree_on_plan(engine.ranks.talk, plan)
        engine.bind(layout, plan)
        if decision.stays:
            self._stays(engine, plan, decision.why)
            if engine.ranks.group.rank() == 0 and self._ranks > _EXACT_RANKS:
                order = [param.name for param in engine.layout.params]
                self._memory.keep_choice(SavedPlan(order, decision.plan))
        elif self._steps == self._first_step:
            self._name(engine, plan, decision.why)

    def _plan(self, layout: FlatBuffers, candidate: Candidate) -> Plan:
        assert self._trace is not None
        return candidate.plan(
            self._trace,
            layout.flats,
            self._network,
            ranks=self._ranks,
            window=self._window,
            methods=self._methods,
            pace=self._pace(),
        )

    def _pace(self) -> float:
        """Of the network under the real load, and past what short tests can get through at once."""
        return median(self._paces) if self._paces else 1.0

    def _note_switch(self, engine: Engine, what: str) -> None:
        text = f"step {self._steps}: {what}"
        engine.history.append(text)
        if engine.ranks.group.rank() == 0:
            _log.info(text)

    def _note(self, engine: Engine) -> None:
        if self._before is not None and self._before.complete:
            self._traces.append(self._trace_of(engine, self._before, self._before))
            self._note_pace(engine, self._before)
        self._before = engine.profiler.record

    def _note_pace(self, engine: Engine, record: Record) -> None:
        pace = pace_of(record, engine.bound_plan.plan, self._network)
        if pace:
            self._paces.append(pace)

    def _trace_of(self, engine: Engine, backward: Record, forward: Record) -> Trace:
        return trace_of(backward, forward, engine.layout.params, model=type(engine.model).__name__)

    def _first_rank(self, engine: Engine, mine: _T) -> _T:
        engine.flush()  # nothing else may be on the group now
        return comm.first_rank_object(engine.ranks.talk, mine)
