"""Who is still there: what the ranks tell each other when something has failed.

The ranks talk through torch's key-value store, which does not depend on the broken collective. A
rank that fails leaves a note there. It says what is wrong with that rank; or else what it waited
for in vain. All others then say where they are, and whoever has left no note after a short while is
at fault, as far as can be known. Of a rank whose connection has broken without a note it is known
sooner.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar
from uuid import uuid4

import torch.distributed as dist

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime import comm
from soonest.runtime.comm import connections, groups
from soonest.runtime.comm.signals import is_from_handler
from soonest.runtime.device.threads import Helper

_E = TypeVar("_E", bound=Exception)
_GRACE_S = 4.0
_BROKEN_S = 1.0
"""So long may a rank to which one connection has broken, and others stand, leave a note: that one
breaks also when the rank gives up."""
_LOOK_S = 0.05
_FIRST_LOOK_S = 0.002
_OF_BACKENDS = (
    "gloo",
    "nccl",
    "connection",
    "socket",
    "peer",
    "timed out",
    "timeout",
    "process group",
)
_FAULT, _LOST, _BUSY = "!", "-", "~"
"""How a note begins that says what is wrong with the rank that left it; that others left of a rank
that is gone; and that says where a rank is that waits for nobody. Others say what is waited for."""


class FailureReporter:
    """The ranks of a group, with their names.

    Args:
        group: over which to talk at the start.
        what: the ranks do there.
    """

    def __init__(self, group: comm.Group, what: str = "prioritize()") -> None:
        self.rank = group.rank()
        self._group = group
        store = groups.store_of(group)
        _meetings[group.group_name] += 1
        name = f"soonest/{group.group_name}/{_meetings[group.group_name]}"
        self._store = dist.distributed_c10d.PrefixStore(name, store)
        self._notes_are_ours = groups.has_own_store(group)
        self._waits_for: str | None = None
        self._connections = connections.Known()
        self._store_host: int | None = None
        self._store_is_gone = False
        self._unanswered: Helper | None = None
        self.names = [f"rank {rank}" for rank in range(group.size())]
        me = f"rank {self.rank} (host {socket.gethostname()}, process {os.getpid()})"
        with self.together(what):
            every = comm.gather_objects(group, (me, connections.hosts(store), uuid4().hex))
        self.names = [name for name, _, _ in every]
        hosts = [rank for rank, (_, is_host, _) in enumerate(every) if is_host]
        self._store_host = hosts[0] if len(hosts) == 1 else None
        if not self._notes_are_ours:  # those of processes before these may still be there
            self._store = dist.distributed_c10d.PrefixStore(every[0][-1], self._store)
            self._notes_are_ours = True

    def learn_connections(self) -> None:
        """Takes note of whose are which, as they are now; a collective call."""
        every = comm.gather_objects(self._group, connections.ends())
        self._connections = connections.Known(every)

    @property
    def ends(self) -> Sequence[connections.Ends]:
        """Those, by rank; none before."""
        return self._connections.ends

    @property
    def hosts_store(self) -> bool:
        """Whether nobody can leave a note any more when this process has ended."""
        return self.rank == self._store_host

    def cut_connections(self) -> None:
        """So that nothing of this process waits for another rank any more."""
        self._connections.cut()

    # Errors

    @contextmanager
    def together(self, what: str, advice: str = "") -> Iterator[None]:
        """Around collective calls: says who is at fault if they fail.

        Args:
            what: they are for.
            advice: what to do if they failed because not all ranks made them.

        Raises:
            SoonestError: they failed.
        """
        before, self._waits_for = self._waits_for, what
        try:
            with comm.looking(partial(self._look, what)):
                yield
        except SoonestError:
            raise
        except RuntimeError as error:
            if is_from_handler(error):
                self.at_fault(error)
                raise
            raise self.failed(what, "could not be done on all ranks", error, advice) from error
        except BaseException as error:  # the others are left alone in there
            self.tell(said(error))
            raise
        finally:
            self._waits_for = before

    def _look(self, what: str) -> None:
        """Raises PeerLostError if another rank has given up."""
        if self._notes_are_ours and (who := self.blame(what, False)) is not None:
            raise PeerLostError(f"{what} will not be done on all ranks: {who}")

    def failed(self, what: str, how: str, error: Exception, advice: str = "") -> SoonestError:
        """The error to raise when a backend has raised one: says who is at fault, if anybody is.

        Args:
            what: has failed; what this rank waited for.
            how: it has failed, in words that follow.
            error: the backend's.
            advice: what to do if other ranks are not here.
        """
        if not is_of_backend(error):  # as where this rank is out of memory
            self.tell(said(error))
            return SoonestError(f"{what} {how}, as this rank failed: {error}")
        who = self.blame(what, True, error)
        if who is None:
            return SoonestError(f"{what} {how}, though all ranks were there: {reason_of(error)}")
        return PeerLostError(f"{what} {how}: {who}{advice} ({reason_of(error)})")

    def tell(self, fault: str) -> None:
        """Lets the others know what is wrong with this rank, so that they need not wait for it."""

        def note() -> None:
            with suppress(Exception):
                self._note(_FAULT + fault)
                self._store.set(f"read/{self.rank}", "yes")  # it asks for no other's

        self._in_time(note)

    def at_fault(self, error: _E) -> _E:
        """As ``tell``, of an error that is to be raised on this rank."""
        self.tell(said(error))
        return error

    # Notes

    def blame(self, what: str, failed: bool, error: Exception | None = None) -> str | None:
        """Says in words who is at fault.

        Args:
            what: this rank was waiting for.
            failed: this rank has given up; otherwise it only looks whether another has.
            error: the backend's, because of which it has.

        Returns:
            None if nobody is known to be at fault.
        """
        gone = self._connections.broken(error) if error is not None else None
        if self._store_is_gone:
            return self._without_store(gone, "is gone") if failed else None
        answer: list[str | None] = [self._without_store(gone, "does not answer")]

        def ask() -> None:
            try:
                answer[0] = self._missing(what, gone) if failed else self._given_up(what)
                if failed or answer[0] is not None:
                    self._store.set(f"read/{self.rank}", "yes")
            except Exception:  # the store is what has failed
                self._store_is_gone = True
                answer[0] = self._without_store(gone, "is gone") if failed else None

        return answer[0] if self._in_time(ask) or failed else None

    def answer(self, where: str) -> None:
        """If another rank has given up: lets it know that this one is there.

        Args:
            where: this rank is; it waits for nobody in a lane.
        """
        if self._store_is_gone:
            return
        try:
            if self._store.check(["failed"]):
                self._note(self._waits_for or _BUSY + where)
        except Exception:  # who is lost with it shows when this rank waits for others
            self._store_is_gone = True

    def wait_for_notes(self) -> None:
        """Returns when all others know who is at fault, or do not ask; before the store goes."""

        def look() -> None:
            deadline_s = time.monotonic() + _GRACE_S
            with suppress(Exception):
                keys = [f"read/{rank}" for rank in range(len(self.names)) if rank != self.rank]
                while not self._store.check(keys) and time.monotonic() < deadline_s:
                    time.sleep(_LOOK_S)

        self._in_time(look)

    def _in_time(self, ask: Callable[[], None]) -> bool:
        """Whether the store answered: it may hang on a host that is cut off, and we must not."""
        if self._unanswered is not None and self._unanswered.is_alive():
            return False
        asking = Helper(ask, "asks")
        asking.join(_GRACE_S + 1)
        self._unanswered = asking if asking.is_alive() else None
        return self._unanswered is None

    def _note(self, text: str, rank: int | None = None) -> None:
        of_whom = f"failed/{self.rank if rank is None else rank}"
        if not self._store.check([of_whom]):  # the first one counts
            self._store.set(of_whom, text)
            self._store.set("failed", "yes")

    def _given_up(self, what: str) -> str | None:
        return self._missing(what) if self._store.check(["failed"]) else None

    def _missing(self, what: str, gone: int | None = None) -> str | None:
        """Who is at fault.

        Args:
            what: this rank waits for.
            gone: a rank to which the connection has broken.
        """
        self._note(what)
        silent = [rank for rank in range(len(self.names)) if rank != self.rank]
        notes: dict[int, str] = {}
        began_s = time.monotonic()
        pause_s = _FIRST_LOOK_S
        while True:
            ended = self._connections.ended(silent)  # before their notes are read: who left one may
            for rank in [rank for rank in silent if self._store.check([f"failed/{rank}"])]:
                silent.remove(rank)
                notes[rank] = self._store.get(f"failed/{rank}").decode()
            for rank, note in notes.items():
                if note.startswith(_FAULT):
                    return f"{self.names[rank]} failed: {note.removeprefix(_FAULT)}"
            lost = [rank for rank, note in notes.items() if note.startswith(_LOST)]
            if lost:
                return self._did_not_take_part(lost)
            waited_s = time.monotonic() - began_s
            lost = [rank for rank in ended if rank in silent]
            if gone in silent and waited_s > _BROKEN_S:
                lost.append(gone)
            for rank in lost:
                self._note(_LOST, rank)
                self._store.set(f"read/{rank}", "yes")
            if lost:
                continue
            if not silent or waited_s > _GRACE_S:
                break
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S)
        notes = dict(sorted(notes.items()))  # the words do not depend on who answered first
        busy = {rank: note for rank, note in notes.items() if note.startswith(_BUSY)}
        if silent:
            why = f", and {_have(silent)} not answered within {_GRACE_S:.0f} s"
            return self._did_not_take_part(silent) + why
        if busy:
            return (
                f"{' and '.join(self._place(*one) for one in busy.items())}, and waits for nobody"
            )
        elsewhere = {rank: note for rank, note in notes.items() if note != what}
        # Ranks in the same step do not keep each other waiting, if another is elsewhere.
        step = _step_of(what)
        others = {r: note for r, note in elsewhere.items() if not step or _step_of(note) != step}
        elsewhere = others or elsewhere
        if elsewhere:
            places = [f"{self.names[rank]} waits for {note}" for rank, note in elsewhere.items()]
            return f"the ranks are at different points: {'; '.join(places)}"
        return None

    def _did_not_take_part(self, ranks: Sequence[int]) -> str:
        return " and ".join(self.names[rank] for rank in ranks) + " did not take part"

    def _place(self, rank: int, note: str) -> str:
        return f"{self.names[rank]} did not take part: it is {note.removeprefix(_BUSY)}"

    def _without_store(self, gone: int | None, how: str) -> str:
        """Who is at fault, where the key-value store does not say."""
        host = self._store_host
        if host is not None and host != self.rank:  # others may have ended because it did
            return f"{self._did_not_take_part([host])}: the key-value store in it {how}"
        if gone is not None:
            return self._did_not_take_part([gone])
        return f"the key-value store {how}, and perhaps its process with it"


def _step_of(what: str) -> str | None:
    """``step 7``, of what a rank waits for in its step 7; None of what belongs to no step."""
    found = re.match(r"step \d+(?=:)", what)
    return found[0] if found is not None else None


def _have(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


def is_of_backend(error: Exception) -> bool:
    """Whether it may be about another rank: any other error would come without any, too."""
    if isinstance(error, dist.DistError | TimeoutError):
        return True
    words = str(error).lower()
    return any(word in words for word in _OF_BACKENDS)


def reason_of(error: Exception) -> str:
    """What a backend says about a collective that failed, without its guesses."""
    return str(error).split(". This is typically", 1)[0]


def said(error: BaseException) -> str:
    """An error in words for other ranks, in one line."""
    text = " ".join(str(error).split())
    if text and isinstance(error, SoonestError | ValueError):  # then it is a sentence
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_meetings: Counter[str] = Counter()
"""How often each group's ranks have met; it is the same on all of them."""
