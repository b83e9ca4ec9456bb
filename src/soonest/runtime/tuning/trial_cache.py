"""What runs of one job remember for those after them, where cut and method decide the rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from soonest.core.plan import Plan
from soonest.runtime.tuning.cache import keep, place_of, recall
from soonest.runtime.tuning.candidates import Trial, turns_of

_FORMAT = 2


class SavedPlan(NamedTuple):
    """What stayed, for training that is resumed.

    Args:
        order: of the parameters in the flat buffers, by name.
        plan: as JSON.
    """

    order: list[str]
    plan: dict[str, Any]


class TrialCache:
    """The memory of the first rank.

    Args:
        job: what tells this training from others, as JSON.

    Attributes:
        turns: that earlier runs have had.
        searched: the plan that an earlier run has searched for; None if none has.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = {**job, "format": _FORMAT}
        self._file: Path | None = None
        self.turns: list[Trial] = []
        self.searched: Plan | None = None

    def recall_turns(self, details: Mapping[str, Any]) -> bool:
        """Finds out what earlier runs have measured.

        Args:
            details: what else turns depend on, as JSON.

        Returns:
            Whether what this run measures can be kept.
        """
        self._file = place_of("turns", {**self._job, **details})
        data = recall(self._file) if self._file else None
        try:
            self.searched = Plan.from_json(data["searched"])  # type: ignore[index]
            self.turns = turns_of(data["turns"])  # type: ignore[index]
        except (KeyError, TypeError, ValueError):  # none yet, or no longer readable
            self.searched, self.turns = None, []
        return self.keep_turns(self.turns)

    def keep_turns(self, turns: Sequence[Trial]) -> bool:
        """Lets later runs know, also of the searched plan; False where that is not possible."""
        plan = self.searched
        data = {"searched": plan.to_json() if plan else None, "turns": turns}
        return self._file is not None and keep(self._file, data)

    def forget_turns(self) -> None:
        """From now on neither those of earlier runs count here, nor those of this one later."""
        self._file, self.turns, self.searched = None, [], None

    def choice(self) -> SavedPlan | None:
        """What stayed last; None if nothing is known."""
        file = place_of("choice", self._job)
        try:
            choice = SavedPlan(**recall(file)) if file else None
            if choice is not None:
                Plan.from_json(choice.plan)
                choice = choice._replace(order=[str(name) for name in choice.order])
        except (TypeError, ValueError):  # none yet, or no longer readable
            return None
        return choice

    def keep_choice(self, choice: SavedPlan) -> None:
        """Lets later runs know what stays."""
        if file := place_of("choice", self._job):
            keep(file, choice._asdict())
