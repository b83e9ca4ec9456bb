"""Which plans are tried, what was measured of each, and which is next; known to the first rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from soonest.core.cost import Network
from soonest.core.plan import Bucket, Plan
from soonest.core.planner.planner import best_plan
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.tuning import plan_file
from soonest.runtime.tuning.candidates import (
    CANDIDATES,
    SEARCHED,
    Candidate,
    Trial,
    distinct,
    next_trial,
    of_equal_numbers,
    reason_for,
    with_searched,
)
from soonest.runtime.tuning.observations import Observations
from soonest.runtime.tuning.trial_cache import TrialCache

EXACT_RANKS = 2
"""With at most this many ranks, sums do not depend on bucketing: a + b = b + a."""


class Trials:
    """Tries candidates and remembers the results from one run to the next.

    Args:
        network, window, methods, ranks: as for ``AutoTuner``.
        seen: what the observed steps have shown.
        cache: what earlier runs have measured.

    Attributes:
        now: the candidate that is tried now, or was selected.
    """

    def __init__(
        self,
        network: Network,
        *,
        window: int,
        methods: Sequence[str],
        ranks: int,
        seen: Observations,
        cache: TrialCache,
    ) -> None:
        self._network = network
        self._window = window
        self._methods = methods
        self._ranks = ranks
        self._seen = seen
        self._cache = cache
        self._to_try: tuple[Candidate, ...] = CANDIDATES
        self._candidates: tuple[Candidate, ...] = ()
        self._trials: list[Trial] = []
        self.now = CANDIDATES[0]

    def __repr__(self) -> str:
        return f"Trials({len(self._trials)} of {len(self._to_try)} candidates, {self.now.name})"

    def choose_candidates(self, layout: FlatBuffers, inputs: Sequence[str]) -> None:
        """Chooses the candidates for these buffers, and recalls what is known of them.

        Args:
            layout: the flat buffers.
            inputs: shapes and dtypes of what the model is given, as steps take longer with more.
        """
        buckets_of = {
            candidate: candidate.bucketing(
                layout.flats, self._network, ranks=self._ranks, methods=self._methods
            )
            for candidate in CANDIDATES
            if candidate != SEARCHED
        }
        self._to_try = distinct(CANDIDATES, buckets_of)
        self.now = self._to_try[0]
        if self._ranks <= EXACT_RANKS:
            return
        details: Mapping[str, Any] = {
            "flats": [asdict(flat) for flat in layout.flats],
            "cuts": [[asdict(bucket) for bucket in buckets] for buckets in buckets_of.values()],
            "candidates": [candidate.name for candidate in self._to_try],
            "inputs": inputs,
        }
        if not self._cache.recall_trials(details):
            self._to_try = of_equal_numbers(self.now, buckets_of[self.now])

    def start_over(self, buckets: tuple[Bucket, ...]) -> None:
        """Forgets all trials; with ranks whose sums are rounded, the buckets stay as they are."""
        if self._ranks > EXACT_RANKS:
            self._to_try = of_equal_numbers(self.now, buckets)
        self._cache.forget_trials()
        self._trials = []

    def begin(self, layout: FlatBuffers) -> None:
        """Begins with what the observed steps have shown, which a plan is searched for by."""
        self._seen.conclude()
        plan = self._searched(layout) if SEARCHED in self._to_try else None
        self._candidates = with_searched(self._to_try, plan)

    def _searched(self, layout: FlatBuffers) -> Plan | None:
        """The plan that a search finds, or found in an earlier run; None if it is the usual one."""
        assert self._seen.trace is not None
        searched = self._cache.searched
        if searched is None or not plan_file.fits(searched, layout, self._ranks):
            searched = self._cache.searched = best_plan(
                self._seen.trace,
                layout.flats,
                self._network.slowed(self._seen.pace),
                ranks=self._ranks,
                methods=self._methods,
            )
            self._cache.keep_trials([])
        usual = self._plan(layout, self._to_try[0])
        return None if searched.buckets == usual.buckets else searched

    def note(self, step_s: tuple[float, ...]) -> None:
        """Counts a trial of ``now``, as it went or as an earlier run has measured it.

        Args:
            step_s: how long its steps took, seconds.
        """
        number, known = len(self._trials), self._cache.trials
        if number < len(known) and known[number].name == self.now.name:
            self._trials.append(known[number])
            return
        self._trials.append(Trial(self.now.name, step_s))
        self._cache.trials = []
        self._cache.keep_trials(self._trials)

    def next(self) -> tuple[bool, str]:
        """Makes ``now`` the candidate to go on with.

        Returns:
            Whether it is selected, and why, in words.
        """
        self.now, selected = next_trial(self._trials, self._candidates)
        if not selected:
            return False, f"trial of {self.now.name}"
        remembered = " as remembered" if self._cache.trials == self._trials else ""
        return True, reason_for(self.now, self._trials) + remembered

    def plan(self, layout: FlatBuffers) -> Plan:
        """The plan of ``now`` for these buffers."""
        return self._plan(layout, self.now)

    def _plan(self, layout: FlatBuffers, candidate: Candidate) -> Plan:
        assert self._seen.trace is not None
        return candidate.plan(
            self._seen.trace,
            layout.flats,
            self._network,
            ranks=self._ranks,
            window=self._window,
            methods=self._methods,
            pace=self._seen.pace,
        )
