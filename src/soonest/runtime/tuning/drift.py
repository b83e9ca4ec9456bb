"""Notices when steps have come to take another time, for good."""

from __future__ import annotations

_WINDOW = 32
"""Steps per window, of which one time is taken."""
_WINDOWS = 2
"""Consecutive windows that must have changed the same way."""
_FACTOR = 1.25
"""Relative change in step time that triggers re-planning; jitter stays below."""
_FIRST, _LATEST = 128, 1024
"""Steps until ranks first compare: under the first selected plan, and at most under later ones."""
_PAUSE = 256
"""Steps between two comparisons; each waits for all that is in flight, which costs part of a
step."""


class Drift:
    """Watches how long steps take under a plan that was selected.

    It asks no clock. How steps are counted does not depend on how long they
    take, so all ranks compare after the same ones.

    Args:
        plans: how many were watched before; each doubles the time until the first comparison, so
            that plans change ever more rarely where steps never settle.
    """

    def __init__(self, *, plans: int = 0) -> None:
        self._due = min(_FIRST << plans, _LATEST)
        self._steps = 0
        self._before_s: float | None = None
        self._window_s: list[float] = []
        self._usual_s: float | None = None
        self._factor = 1.0
        self._off = 0

    def ended(self, *at_s: float) -> bool:
        """Counts a step that has ended.

        Args:
            at_s: when it did; or, of a device that is behind, when earlier ones did, one after the
                other, as far as that is known by now.

        Returns:
            Whether the ranks are to compare now.
        """
        for end_s in at_s:
            self._note(end_s)
        self._steps += 1
        if self._steps < self._due:
            return False
        self._due += _PAUSE
        return True

    def _note(self, end_s: float) -> None:
        """Takes in the end of one step, and looks at the window that it completes."""
        if self._before_s is not None:
            self._window_s.append(end_s - self._before_s)
        self._before_s = end_s
        if len(self._window_s) == _WINDOW:
            self._look(sorted(self._window_s)[_WINDOW // 4])
            self._window_s.clear()

    def _look(self, step_s: float) -> None:
        """Compares one window with the first by its lower quartile; evaluations lengthen others."""
        if self._usual_s is None:
            self._usual_s = step_s
        before, self._factor = self._factor, step_s / self._usual_s
        if _way(self._factor) == 0:
            self._off = 0
        else:
            self._off = self._off + 1 if _way(self._factor) == _way(before) else 1

    @property
    def factor(self) -> float | None:
        """By which factor steps take longer than at first; None as long as that has not changed."""
        return self._factor if self._off >= _WINDOWS else None


def _way(factor: float) -> int:
    """1 if steps got slower, -1 if faster, 0 if neither."""
    return (factor > _FACTOR) - (factor < 1 / _FACTOR)
