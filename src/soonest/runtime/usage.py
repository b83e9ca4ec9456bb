"""Which parameters any rank has used, where sums show it only to the rank that updates them."""

from __future__ import annotations

from torch import Tensor

from soonest.runtime import collectives
from soonest.runtime.collectives import Group


class Users:
    """How many ranks have a gradient of each parameter after one backward pass; on its way.

    ``DistributedDataParallel`` sends the same to find unused parameters.

    Args:
        group: of all ranks, for nothing else; to make this is a collective call.
        used: by order of the member, 1 where this rank has a gradient, else 0.
    """

    def __init__(self, group: Group, used: Tensor) -> None:
        self._counts, self._work = collectives.start_sum(group, used)
        self._known: list[float] | None = None

    def has(self, order: int) -> bool:
        """Whether any rank has a gradient of this member; waits until that is known."""
        self.wait()
        assert self._known is not None
        return self._known[order] > 0

    def wait(self) -> None:
        """Returns when this rank has what it needs of the others, and they of it."""
        if self._known is None:
            collectives.finish(self._work, on_device=not self._counts.is_cpu)
            self._known = self._counts.tolist()
