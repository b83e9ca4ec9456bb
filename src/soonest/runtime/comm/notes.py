"""Notes that ranks leave each other in torch's key-value store when something has failed.

The store works while a collective hangs. But it may go with the process that it is in, or hang on a
host that is cut off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch.distributed as dist

from soonest.runtime.device.threads import Helper

FAULT, LOST, BUSY = "!", "-", "~"
"""How a note begins that says what is wrong with the rank that left it; that others left of a rank
that is gone; and that says where a rank is that waits for nobody. Others say what is waited for."""
LOOK_S = 0.05
"""The longest pause between two looks for notes."""
_FAILED = "failed"


class Notes:
    """One note of each rank at most: the first that is left counts.

    Args:
        store: where these ranks leave them.
        rank: this one.
        ranks: how many there are.

    Attributes:
        store_is_gone: the store did not do what it was asked for.
    """

    def __init__(self, store: dist.distributed_c10d.Store, rank: int, ranks: int) -> None:
        self._store = store
        self._rank = rank
        self._ranks = ranks
        self._unanswered: Helper | None = None
        self.store_is_gone = False

    def __repr__(self) -> str:
        store = "gone" if self.store_is_gone else "there"
        return f"Notes(rank {self._rank} of {self._ranks}, store {store})"

    def move_to(self, word: str) -> None:
        """Goes to a place in the store where only these ranks have ever been."""
        self._store = dist.distributed_c10d.PrefixStore(word, self._store)

    def leave(self, text: str, rank: int | None = None) -> None:
        """Leaves a note of this rank, or of another one, unless there is one.

        Raises:
            RuntimeError: the store is gone.
        """
        key = self._key(self._rank if rank is None else rank)
        if not self._store.check([key]):
            self._store.set(key, text)
            self._store.set(_FAILED, "yes")

    def mark_read(self, rank: int | None = None) -> None:
        """Notes that this rank, or another one, will not ask for notes any more.

        Raises:
            RuntimeError: the store is gone.
        """
        self._store.set(self._read_key(self._rank if rank is None else rank), "yes")

    def exist(self) -> bool:
        """Whether any rank has left one.

        Raises:
            RuntimeError: the store is gone.
        """
        return self._store.check([_FAILED])

    def of(self, ranks: Sequence[int]) -> dict[int, str]:
        """The notes that there are of some ranks.

        Raises:
            RuntimeError: the store is gone.
        """
        there = [rank for rank in ranks if self._store.check([self._key(rank)])]
        return {rank: self._store.get(self._key(rank)).decode() for rank in there}

    def wait_for_readers(self, limit_s: float) -> None:
        """Returns when no other rank will ask for notes any more, or after so long."""
        keys = [self._read_key(rank) for rank in range(self._ranks) if rank != self._rank]
        deadline_s = time.monotonic() + limit_s
        with suppress(Exception):
            while not self._store.check(keys) and time.monotonic() < deadline_s:
                time.sleep(LOOK_S)

    def in_time(self, ask: Callable[[], None], limit_s: float) -> bool:
        """Asks the store for something in a thread of its own, as it may hang.

        Args:
            ask: asks.
            limit_s: how long to wait for that.

        Returns:
            Whether it has ended; False, too, as long as an earlier question has not been answered.
        """
        if self._unanswered is not None and self._unanswered.is_alive():
            return False
        asking = Helper(ask, "asks")
        asking.join(limit_s)
        self._unanswered = asking if asking.is_alive() else None
        return self._unanswered is None

    @staticmethod
    def _key(rank: int) -> str:
        return f"{_FAILED}/{rank}"

    @staticmethod
    def _read_key(rank: int) -> str:
        return f"read/{rank}"
