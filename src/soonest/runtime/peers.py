"""Who is still there: what the ranks tell each other when something has failed.

The ranks talk through torch's key-value store, which does not depend on the broken collective. A
rank that fails leaves a note there. It says what is wrong with that rank; or else what it waited
for in vain, and then whoever has left no note after a short while is at fault, as far as can be
known.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch.distributed as dist

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime import collectives, groups

_E = TypeVar("_E", bound=Exception)
_GRACE_S = 5.0
_MEET_S = 0.05
_FAULT = "!"
"""Begins a note that says what is wrong with the rank that left it."""


class Peers:
    """The ranks of a group, with their names.

    Args:
        group: over which to talk at the start.
    """

    def __init__(self, group: collectives.Group) -> None:
        self.rank = group.rank()
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"soonest/{group.group_name}", store)
        self.names = [f"rank {rank}" for rank in range(group.size())]
        me = f"rank {self.rank} (host {socket.gethostname()}, process {os.getpid()})"
        with self.together("prioritize()"):
            self.names = collectives.gather_objects(group, me)

    @contextmanager
    def together(self, what: str, advice: str = "") -> Iterator[None]:
        """Around collective calls: says who is at fault if they fail.

        Args:
            what: they are for.
            advice: what to do if they failed because not all ranks made them.

        Raises:
            PeerLostError: they failed.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, SoonestError):
                raise
            who = self.blame(what, True) or "no rank is known to be missing"
            raise PeerLostError(
                f"{what} could not be done on all ranks: {who}{advice} ({reason_of(error)})"
            ) from error

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
                answer[0] = self._missing(what) if failed else self._given_up(what)
            except Exception:  # the store is what has failed
                answer[0] = (
                    "the key-value store is gone, and perhaps its process with it"
                    if failed
                    else None
                )

        return answer[0] if _in_time(ask) or failed else None

    def tell(self, fault: str) -> None:
        """Lets the others know what is wrong with this rank, so that they need not wait for it."""

        def note() -> None:
            with suppress(Exception):
                self._note(_FAULT + fault)

        _in_time(note)

    def at_fault(self, error: _E) -> _E:
        """As ``tell``, of an error that is to be raised on this rank."""
        self.tell(str(error))
        return error

    def _note(self, text: str) -> None:
        mine = f"failed/{self.rank}"
        if not self._store.check([mine]):  # the first one counts
            self._store.set(mine, text)
            self._store.set("failed", "yes")

    def _given_up(self, what: str) -> str | None:
        return self._missing(what) if self._store.check(["failed"]) else None

    def _missing(self, what: str) -> str | None:
        self._note(what)
        missing = [rank for rank in range(len(self.names)) if rank != self.rank]
        elsewhere: list[str] = []
        deadline = time.monotonic() + _GRACE_S
        while True:
            for rank in list(missing):
                if self._store.check([f"failed/{rank}"]):
                    missing.remove(rank)
                    note = self._store.get(f"failed/{rank}").decode()
                    if note.startswith(_FAULT):
                        return f"{self.names[rank]} failed: {note.removeprefix(_FAULT)}"
                    if note != what:
                        elsewhere.append(f"{self.names[rank]} waits for {note}")
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if missing:
            return " and ".join(self.names[rank] for rank in missing) + " did not take part"
        return f"the ranks are at different points: {'; '.join(elsewhere)}" if elsewhere else None


def _in_time(ask: Callable[[], None]) -> bool:
    """Whether the store answered: it may hang on a host that is cut off, and nobody else must."""
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * _GRACE_S)
    return not asking.is_alive()


def reason_of(error: Exception) -> str:
    """What a backend says about a collective that failed, without its guesses."""
    return str(error).split(". This is typically", 1)[0]


def private_group(parent: collectives.Group, timeout_s: float | None) -> collectives.Group:
    """A communicator of our own over the ranks of ``parent``; a collective call.

    Args:
        parent: of which ranks.
        timeout_s: of every collective; None keeps torch's default.

    Raises:
        PeerLostError: not all of them came.
    """
    members = dist.get_process_group_ranks(parent)
    _calls[parent.group_name] += 1
    store = dist.distributed_c10d.PrefixStore(
        f"soonest/prioritize/{parent.group_name}/{_calls[parent.group_name]}",
        dist.distributed_c10d._get_default_store(),
    )
    store.set(str(parent.rank()), "here")
    try:
        if dist.get_backend(parent) != "gloo":  # which connects at once; others would wait later
            timeout = groups.timeout_for(parent, timeout_s)
            _meet(store, len(members), timeout.total_seconds())
        return groups.private_group(parent, timeout_s)
    except RuntimeError as error:
        try:
            missing = [rank for rank in range(len(members)) if not store.check([str(rank)])]
        except RuntimeError:
            missing = []
        who = " and ".join(f"rank {rank}" for rank in missing) or "no rank is known to be missing"
        raise PeerLostError(
            f"prioritize() could not connect the ranks: {who}{' did not call it' * bool(missing)} "
            f"({reason_of(error)})"
        ) from error


def _meet(store: dist.distributed_c10d.PrefixStore, ranks: int, timeout_s: float) -> None:
    """Returns when all ranks have come.

    Raises:
        RuntimeError: not all of them have in time.
    """
    keys = [str(rank) for rank in range(ranks)]
    deadline_s = time.monotonic() + timeout_s
    while not store.check(keys):
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"waited {timeout_s:.0f} s for all to come")
        time.sleep(_MEET_S)


_calls: Counter[str] = Counter()
"""How often each group's ranks have called ``prioritize``; it is the same on all of them."""
