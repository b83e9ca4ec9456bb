"""Who is still there: what the ranks tell each other when something has failed.

The ranks talk through torch's key-value store, which does not depend on the broken collective. A
rank whose lane fails leaves a note there. Whoever has left none after a short while is at fault, as
far as can be known.
"""

from __future__ import annotations

import os
import socket
import threading
import time

import torch.distributed as dist

from soonest.runtime import collectives

_GRACE_S = 5.0


class Peers:
    """The ranks of a group, with their names.

    Args:
        group: over which to talk at the start.
    """

    def __init__(self, group: collectives.Group) -> None:
        self.rank = group.rank()
        me = f"rank {self.rank} (host {socket.gethostname()}, process {os.getpid()})"
        self.names: list[str] = collectives.gather_objects(group, me)
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"soonest/{group.group_name}", store)

    def blame(self, what: str, failed: bool) -> str | None:
        """Says in words who is at fault.

        Args:
            what: this rank was waiting for.
            failed: this rank has given up; otherwise it only looks whether another has.

        Returns:
            None if nobody is known to be at fault.
        """
        answer: list[str | None] = ["the key-value store does not answer, so its host may be gone"]

        def ask() -> None:
            try:
                answer[0] = self._missing(what) if failed else self._given_up()
            except Exception:  # the store is what has failed
                answer[0] = (
                    "the key-value store is gone, and perhaps its process with it"
                    if failed
                    else None
                )

        # The store may hang on a host that is cut off, and this must not.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * _GRACE_S)
        return answer[0] if failed or not asking.is_alive() else None

    def _given_up(self) -> str | None:
        if not self._store.check(["failed"]):
            return None
        return self._missing("waiting for others")

    def _missing(self, what: str) -> str | None:
        self._store.set(f"failed/{self.rank}", what)
        self._store.set("failed", "yes")
        others = [rank for rank in range(len(self.names)) if rank != self.rank]
        deadline = time.monotonic() + _GRACE_S
        missing = others
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self._store.check([f"failed/{rank}"])]
            time.sleep(0.05)
        if not missing:
            return None
        names = " and ".join(self.names[rank] for rank in missing)
        return f"{names} did not take part"
