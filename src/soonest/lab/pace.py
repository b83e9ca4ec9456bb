"""Sleeps that stand in for computing, and that add up to the right time."""

from __future__ import annotations

import time


class Pace:
    """Sleeps such that their sum is right: what one takes too long, the next ones give back.

    Attributes:
        late_s: how much has still to be given back. It only grows where making the gradients takes
            longer than the layers may take, and then the times are not those asked for.
    """

    def __init__(self) -> None:
        self.late_s = 0.0

    def fill(self, length_s: float, began_s: float) -> None:
        """Sleeps until ``length_s`` have passed since ``began_s``, less what was late before."""
        wanted_s = length_s - self.late_s
        left_s = began_s + wanted_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        self.late_s = time.perf_counter() - began_s - wanted_s
