"""How far a piece of work has got, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from soonest.bench.settings import SWEPT, VARIANTS, WARM_UP, Settings


class Work:
    """What is done of some work.

    Pieces of work count by how long they should take on paper; how much slower they are in truth
    is seen from those that are done.

    Args:
        all_s: what all of it should take, seconds.

    Attributes:
        doing: what has been done last, in words.
        share: of the work that is done, 0 to 1.
    """

    def __init__(self, all_s: float) -> None:
        self._began_s = time.monotonic()
        self._done_s = 0.0
        self._all_s = all_s
        self.doing = "starting"

    @property
    def share(self) -> float:
        return min(1.0, self._done_s / self._all_s)

    @property
    def left_s(self) -> float | None:
        """Seconds until the end; None as long as nothing is known."""
        if not self._done_s:
            return None
        return (time.monotonic() - self._began_s) * (1 / self.share - 1)


class Progress(Work):
    """What is done of a comparison."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        super().__init__(
            sum(self._making_s(arm) + settings.rounds * self._round_s(arm) for arm in settings.arms)
        )

    def take(self, message: Mapping[str, Any]) -> bool:
        """Takes note of what a rank told; whether that is worth showing."""
        arm = message.get("arm", "")
        match message["kind"]:
            case "making":
                self.doing = f"{arm}: warming up"
            case "tried":
                self._done_s += self._step_s(arm) * (1 + SWEPT)
                self.doing = f"{arm}: bucket size {message['bucket']}"
            case "made":
                self._done_s += self._step_s(arm) * self._warm_up(arm)
            case "round":
                self._done_s += self._round_s(arm)
                turn = f"round {message['round'] + 1} of {self._settings.rounds}"
                self.doing = f"{arm}: {message['step_ms']:.1f} ms a step, {turn}"
            case _:
                return False
        return message["kind"] != "made"

    def _making_s(self, arm: str) -> float:
        tried = len(self._settings.sweep()) * (1 + SWEPT) if arm == "ddp-tuned" else 0
        return self._step_s(arm) * (self._warm_up(arm) + tried)

    def _warm_up(self, arm: str) -> int:
        """About so many steps; soonest plans meanwhile."""
        if not _is_soonest(arm):
            return WARM_UP
        return 22 if self._settings.hosts == 2 else 6

    def _round_s(self, arm: str) -> float:
        return self._step_s(arm) * (self._settings.steps + 1)

    def _step_s(self, arm: str) -> float:
        """What a step of an arm may take in slow motion."""
        settings = self._settings
        compute_s = settings.trace.forward_s + settings.trace.backward_s
        sending_s = 0.0 if arm == "local" else settings.communication_s
        if _is_soonest(arm):
            return settings.slow_motion * settings.bound_s
        overlapped_s = 0.0 if arm == "sequential" else 0.5 * min(compute_s, sending_s)
        return settings.slow_motion * (compute_s + sending_s - overlapped_s)


def _is_soonest(arm: str) -> bool:
    return arm == "soonest" or arm in VARIANTS
