"""Which rank is at fault when something has failed.

A rank that fails leaves a note, see ``notes``. It says what is wrong with that rank; or else what
it waited for in vain. All others then say where they are, and whoever has left no note after a
short while is at fault, as far as can be known. Of a rank whose connection has broken without a
note it is known sooner.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar
from uuid import uuid4

import torch.distributed as dist

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime import comm
from soonest.runtime.comm import connections, groups
from soonest.runtime.comm.error_text import is_of_backend, reason_of, said
from soonest.runtime.comm.notes import BUSY, FAULT, LOOK_S, LOST, Notes
from soonest.runtime.comm.signals import is_from_handler

_E = TypeVar("_E", bound=Exception)
_GRACE_S = 4.0
"""How long a rank may take to leave a note, seconds, before it is taken to be lost."""
_BROKEN_S = 1.0
"""How long it may take if one connection to it has broken and others stand: that one breaks also
when the rank gives up."""
_FIRST_LOOK_S = 0.002
"""The first pause between two looks for notes; each is twice as long as the one before."""


class FailureReporter:
    """Knows the ranks of a group by name, and finds out which one is at fault for a failure.

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
        place = dist.distributed_c10d.PrefixStore(name, store)
        self._notes = Notes(place, self.rank, group.size())
        self._notes_are_ours = groups.has_own_store(group)
        self._waits_for: str | None = None
        self._connections = connections.Known()
        self._store_host: int | None = None
        self.names = [f"rank {rank}" for rank in range(group.size())]
        me = f"rank {self.rank} (host {socket.gethostname()}, process {os.getpid()})"
        with self.together(what):
            every = comm.gather_objects(group, (me, connections.hosts(store), uuid4().hex))
        self.names = [name for name, _, _ in every]
        hosts = [rank for rank, (_, is_host, _) in enumerate(every) if is_host]
        self._store_host = hosts[0] if len(hosts) == 1 else None
        if not self._notes_are_ours:  # those of processes before these may still be there
            self._notes.move_to(every[0][-1])
            self._notes_are_ours = True

    def __repr__(self) -> str:
        waiting = f", waits for {self._waits_for}" if self._waits_for else ""
        return f"FailureReporter({self.names[self.rank]} of {len(self.names)}{waiting})"

    def learn_connections(self) -> None:
        """Remembers whose connections are which, as they are now; a collective call."""
        every = comm.gather_objects(self._group, connections.ends())
        self._connections = connections.Known(every)

    @property
    def ends(self) -> Sequence[connections.Ends]:
        """The ends of all ranks' connections, by rank; none before ``learn_connections``."""
        return self._connections.ends

    @property
    def hosts_store(self) -> bool:
        """Whether nobody can leave a note any more when this process has ended."""
        return self.rank == self._store_host

    def cut_connections(self) -> None:
        """Ends all connections, so that nothing of this process waits for another rank any more."""
        self._connections.cut()

    # Errors

    @contextmanager
    def together(self, what: str, advice: str = "") -> Iterator[None]:
        """Says who is at fault if the collective calls within this context fail.

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

        def leave() -> None:
            with suppress(Exception):
                self._notes.leave(FAULT + fault)
                self._notes.mark_read()  # it asks for no other's

        self._notes.in_time(leave, _GRACE_S + 1)

    def at_fault(self, error: _E) -> _E:
        """Lets the others know of an error of this rank, as ``tell``, and returns it."""
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
        if self._notes.store_is_gone:
            return self._without_store(gone, "is gone") if failed else None
        answer: list[str | None] = [self._without_store(gone, "does not answer")]

        def ask() -> None:
            try:
                asked = failed or self._notes.exist()
                answer[0] = self._missing(what, gone) if asked else None
                if failed or answer[0] is not None:
                    self._notes.mark_read()
            except Exception:  # the store is what has failed
                self._notes.store_is_gone = True
                answer[0] = self._without_store(gone, "is gone") if failed else None

        return answer[0] if self._notes.in_time(ask, _GRACE_S + 1) or failed else None

    def answer(self, where: str) -> None:
        """Lets a rank that has given up know that this one is there.

        Args:
            where: this rank is; it waits for nobody in a lane.
        """
        if self._notes.store_is_gone:
            return
        try:
            if self._notes.exist():
                self._notes.leave(self._waits_for or BUSY + where)
        except Exception:  # who is lost with it shows when this rank waits for others
            self._notes.store_is_gone = True

    def wait_for_notes(self) -> None:
        """Returns when all others know who is at fault, or do not ask; before the store goes."""
        self._notes.in_time(partial(self._notes.wait_for_readers, _GRACE_S), _GRACE_S + 1)

    def _missing(self, what: str, gone: int | None) -> str | None:
        """Asks all others where they are, and says who is at fault.

        Args:
            what: this rank waits for.
            gone: a rank to which the connection has broken.
        """
        self._notes.leave(what)
        silent = [rank for rank in range(len(self.names)) if rank != self.rank]
        notes: dict[int, str] = {}
        began_s = time.monotonic()
        pause_s = _FIRST_LOOK_S
        while True:
            ended = self._connections.ended(silent)  # before their notes are read: who left one may
            notes |= self._notes.of(silent)
            silent = [rank for rank in silent if rank not in notes]
            for rank, note in notes.items():
                if note.startswith(FAULT):
                    return f"{self.names[rank]} failed: {note.removeprefix(FAULT)}"
            lost = [rank for rank, note in notes.items() if note.startswith(LOST)]
            if lost:
                return self._did_not_take_part(lost)
            waited_s = time.monotonic() - began_s
            lost = [rank for rank in ended if rank in silent]
            if gone in silent and waited_s > _BROKEN_S:
                lost.append(gone)
            for rank in lost:
                self._notes.leave(LOST, rank)
                self._notes.mark_read(rank)
            if lost:
                continue
            if not silent or waited_s > _GRACE_S:
                return self._judged(what, notes, silent)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_S)

    def _judged(self, what: str, notes: Mapping[int, str], silent: Sequence[int]) -> str | None:
        """Says who is at fault, where no rank says that it is itself.

        Args:
            what: this rank waits for.
            notes: of the other ranks.
            silent: ranks that have left none.
        """
        if silent:
            have = "has" if len(silent) == 1 else "have"
            why = f", and {have} not answered within {_GRACE_S:.0f} s"
            return self._did_not_take_part(silent) + why
        by_rank = sorted(notes.items())  # the words do not depend on who answered first
        busy = [
            f"{self.names[rank]} did not take part: it is {note.removeprefix(BUSY)}"
            for rank, note in by_rank
            if note.startswith(BUSY)
        ]
        if busy:
            return f"{' and '.join(busy)}, and waits for nobody"
        elsewhere = [(rank, note) for rank, note in by_rank if note != what]
        # Ranks in the same step do not keep each other waiting, if another is elsewhere.
        step = _step_of(what)
        others = [one for one in elsewhere if not step or _step_of(one[1]) != step]
        places = [f"{self.names[rank]} waits for {note}" for rank, note in others or elsewhere]
        return f"the ranks are at different points: {'; '.join(places)}" if places else None

    def _did_not_take_part(self, ranks: Sequence[int]) -> str:
        return " and ".join(self.names[rank] for rank in ranks) + " did not take part"

    def _without_store(self, gone: int | None, how: str) -> str:
        """Says who is at fault, where the key-value store does not."""
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


_meetings: Counter[str] = Counter()
"""How often each group's ranks have met; it is the same on all of them."""
