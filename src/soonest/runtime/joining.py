"""How the ranks of a group come together in a communicator of our own."""

from __future__ import annotations

import time
from collections import Counter

import torch.distributed as dist

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime import collectives, groups
from soonest.runtime.peers import reason_of

_MEET_S = 0.05
"""The longest pause between two looks whether all have come."""


def private_group(parent: collectives.Group, timeout_s: float | None) -> collectives.Group:
    """A communicator of our own over the ranks of ``parent``; a collective call.

    Args:
        parent: of which ranks.
        timeout_s: of every collective; None keeps the parent's.

    Raises:
        PeerLostError: not all of them came.
        SoonestError: they did, but could not be connected.
    """
    members = dist.get_process_group_ranks(parent)
    _calls[parent.group_name] += 1
    store = dist.distributed_c10d.PrefixStore(
        f"soonest/prioritize/{parent.group_name}/{_calls[parent.group_name]}",
        dist.distributed_c10d._get_default_store(),
    )
    store.set(str(parent.rank()), "here")
    try:
        _meet(store, len(members), groups.timeout_for(parent, timeout_s).total_seconds())
        return groups.private_group(parent, timeout_s)
    except SoonestError:
        raise
    except RuntimeError as error:
        try:
            missing = [rank for rank in range(len(members)) if not store.check([str(rank)])]
        except RuntimeError:
            missing = []
        failure = "prioritize() could not connect the ranks"
        if not missing:
            raise SoonestError(f"{failure}, though all called it: {reason_of(error)}") from error
        who = " and ".join(f"rank {rank}" for rank in missing)
        raise PeerLostError(f"{failure}: {who} did not call it ({reason_of(error)})") from error


def _meet(store: dist.distributed_c10d.PrefixStore, ranks: int, timeout_s: float) -> None:
    """Returns when all ranks have come.

    Raises:
        RuntimeError: not all of them have in time.
    """
    keys = [str(rank) for rank in range(ranks)]
    deadline_s = time.monotonic() + timeout_s
    look_s = time.monotonic() + collectives.LOOK_S
    pause_s = 1e-3
    while not store.check(keys):
        now_s = time.monotonic()
        if now_s > deadline_s:
            raise RuntimeError(f"waited {timeout_s:.0f} s for all to come")
        if now_s > look_s:
            collectives.look()
            look_s = now_s + collectives.LOOK_S
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MEET_S)


_calls: Counter[str] = Counter()
"""How often each group's ranks have called ``prioritize``; it is the same on all of them."""
