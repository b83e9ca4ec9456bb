"""Which parameters any rank has used, where sums show it only to the rank that updates them."""

from __future__ import annotations

import time

from torch import Tensor

from soonest.runtime import comm
from soonest.runtime.comm import Group


class Users:
    """Counts, under way, of the ranks that have a gradient of each parameter after one pass.

    ``DistributedDataParallel`` sends the same to find unused parameters.

    Args:
        group: all ranks, used for nothing else; to make this is a collective call.
        used: by order of the parameter, 1 where this rank has a gradient, else 0.
    """

    def __init__(self, group: Group, used: Tensor) -> None:
        self._counts, self._work = comm.start_sum(group, used)
        self._known: list[float] | None = None

    def __repr__(self) -> str:
        state = "known" if self._known is not None else "under way"
        return f"Users(of {self._counts.numel()} parameters, {state})"

    def has(self, order: int) -> bool:
        """Whether any rank has a gradient of this parameter; waits until that is known."""
        if self._known is None:
            comm.finish(self._work, on_device=not self._counts.is_cpu)
            self._known = self._counts.tolist()
        return self._known[order] > 0

    def are_known(self, limit_s: float) -> bool:
        """Waits for the counts, at most so long; returns whether they are there."""
        deadline_s = time.monotonic() + limit_s
        while self._known is None and self._counts.is_cpu and not comm.ended(self._work):
            comm.look()
            if time.monotonic() > deadline_s:
                return False
        return True
