"""On-disk cache of tuning results, so that a restart picks the same plan and rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from soonest.core.plan import Plan
from soonest.runtime.tuning.cache import keep, place_of, recall
from soonest.runtime.tuning.candidates import Trial, trials_of

_FORMAT = 2


class SavedPlan(NamedTuple):
    """The plan that was selected, for training that is resumed.

    Args:
        order: of the parameters in the flat buffers, by name.
        plan: as JSON.
    """

    order: list[str]
    plan: dict[str, Any]


class TrialCache:
    """Keeps the first rank's trials and plans for later runs of one job.

    Args:
        job: what tells this training from others, as JSON.

    Attributes:
        trials: of earlier runs.
        searched: the plan that an earlier run has searched for; None if none has.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = {**job, "format": _FORMAT}
        self._file: Path | None = None
        self.trials: list[Trial] = []
        self.searched: Plan | None = None

    def recall_trials(self, details: Mapping[str, Any]) -> bool:
        """Reads what earlier runs have measured.

        Args:
            details: what else trials depend on, as JSON.

        Returns:
            Whether what this run measures can be kept.
        """
        self._file = place_of("turns", {**self._job, **details})
        data = recall(self._file) if self._file else None
        try:
            self.searched = Plan.from_json(data["searched"])  # type: ignore[index]
            self.trials = trials_of(data["turns"])  # type: ignore[index]
        except (KeyError, TypeError, ValueError):  # none yet, or no longer readable
            self.searched, self.trials = None, []
        return self.keep_trials(self.trials)

    def keep_trials(self, trials: Sequence[Trial]) -> bool:
        """Keeps trials and the searched plan for later runs; False where that is not possible."""
        plan = self.searched
        data = {"searched": plan.to_json() if plan else None, "turns": trials}
        return self._file is not None and keep(self._file, data)

    def forget_trials(self) -> None:
        """Forgets earlier runs' trials here, and keeps no more of this one's for later."""
        self._file, self.trials, self.searched = None, [], None

    def saved_plan(self) -> SavedPlan | None:
        """The plan that was selected last; None if there is none."""
        file = place_of("choice", self._job)
        try:
            saved = SavedPlan(**recall(file)) if file else None
            if saved is not None:
                Plan.from_json(saved.plan)
                saved = saved._replace(order=[str(name) for name in saved.order])
        except (TypeError, ValueError):  # none yet, or no longer readable
            return None
        return saved

    def keep_plan(self, plan: SavedPlan) -> None:
        """Keeps the plan that was selected for later runs."""
        if file := place_of("choice", self._job):
            keep(file, plan._asdict())
