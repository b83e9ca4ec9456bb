"""How the ranks of a group come together in a communicator of our own, and who is missing."""

from __future__ import annotations

import time
from collections import Counter
from uuid import uuid4

import torch.distributed as dist

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime import comm
from soonest.runtime.comm import groups
from soonest.runtime.comm.error_text import reason_of

_LONGEST_PAUSE_S = 0.05
"""The longest pause between two looks whether all have come."""
_FIRST = "first"


def connect(parent: comm.Group, timeout_s: float | None) -> comm.Group:
    """Makes a private group over the ranks of ``parent`` once all have come; a collective call.

    Args:
        parent: of which ranks.
        timeout_s: of every collective; None keeps the parent's.

    Raises:
        PeerLostError: not all of them came.
        SoonestError: they did, but could not be connected.
    """
    ranks = len(dist.get_process_group_ranks(parent))
    _calls[parent.group_name] += 1
    store = dist.distributed_c10d.PrefixStore(
        f"soonest/prioritize/{parent.group_name}/{_calls[parent.group_name]}",
        dist.distributed_c10d._get_default_store(),
    )
    meeting = Rendezvous(store, parent.rank(), ranks)
    try:
        word = meeting.wait(timeout_s=groups.timeout_for(parent, timeout_s).total_seconds())
        own = dist.distributed_c10d.PrefixStore(word, store)
        return groups.private_group(parent, timeout_s, own)
    except SoonestError:
        raise
    except RuntimeError as error:
        try:
            missing = meeting.missing()
        except RuntimeError:
            missing = []
        failure = "prioritize() could not connect the ranks"
        if not missing:
            raise SoonestError(f"{failure}, though all called it: {reason_of(error)}") from error
        who = " and ".join(f"rank {rank}" for rank in missing)
        raise PeerLostError(f"{failure}: {who} did not call it ({reason_of(error)})") from error


class Rendezvous:
    """Lets ranks wait for each other in a key-value store that others may have used before.

    A launcher that starts ranks anew may keep the store, with all that the ranks before these wrote
    there. So the first rank says a word that is new, the others answer to that one, and only what
    the first one repeats of their answers counts.

    Args:
        store: where; the same keys are used by those that met there before.
        rank, ranks: which one this is, of how many.
    """

    def __init__(self, store: dist.distributed_c10d.Store, rank: int, ranks: int) -> None:
        self._store = store
        self._rank = rank
        self._others = range(1, ranks)
        self._mine = uuid4().hex
        self._word: str | None = None
        if rank == 0:
            self._word = self._mine
            store.set(_FIRST, self._mine)

    def wait(self, timeout_s: float) -> str:
        """Returns the word of these ranks when all have come.

        Raises:
            RuntimeError: not all of them have in time.
        """
        deadline_s = time.monotonic() + timeout_s
        look_s = time.monotonic() + comm.LOOK_S
        pause_s = 1e-3
        while not self._all_are_here():
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise RuntimeError(f"waited {timeout_s:.0f} s for all to come")
            if now_s > look_s:
                comm.look()
                look_s = now_s + comm.LOOK_S
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        assert self._word is not None
        return self._word

    def missing(self) -> list[int]:
        """The ranks that have not come, as far as this one can tell."""
        word = self._word
        if word is None or (self._rank and self._store.check([f"{word}/all"])):
            return [] if self._accepted() else [0]
        return [rank for rank in self._others if not self._store.check([f"{word}/{rank}"])]

    def _all_are_here(self) -> bool:
        if self._rank == 0:
            answers = [f"{self._mine}/{rank}" for rank in self._others]
            if not self._store.check(answers):
                return False
            known = [self._store.get(answer).decode() for answer in answers]
            self._store.set(f"{self._mine}/all", " ".join(known))
            return True
        if not self._store.check([_FIRST]):
            return False
        word = self._store.get(_FIRST).decode()
        if word != self._word:
            self._store.set(f"{word}/{self._rank}", self._mine)
            self._word = word
        return self._accepted()

    def _accepted(self) -> bool:
        """Whether the first rank, this one and not one before it, has taken this one's answer."""
        every = f"{self._word}/all"
        return self._store.check([every]) and self._mine in self._store.get(every).decode()


_calls: Counter[str] = Counter()
"""How often each group's ranks have called ``prioritize``; it is the same on all of them."""
