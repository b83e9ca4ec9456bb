"""The passes that a lane still has something to do for, in order."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from soonest.runtime.execute.pass_state import PassState


class PassQueue:
    """The passes that are not finished, the oldest first.

    What others wait for is kept alive here. Apart from that, updates matter to nobody but those who
    may read the parameters, and so a pass lives as long as its bound plan does.
    """

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[PassState], ...] = ()  # replaced, never changed
        self._owing: tuple[PassState, ...] = ()
        self._latest: weakref.ref[PassState] | None = None

    def __iter__(self) -> Iterator[PassState]:
        return (pass_state for known in self._known if (pass_state := known()) is not None)

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self))}]"

    def add(self, pass_state: PassState) -> None:
        for earlier in self:
            earlier.superseded = True
        self._latest = weakref.ref(pass_state)
        self._known = (*self._known, self._latest)
        pass_state.bound_plan.unfinished.add(pass_state)

    def _first(self) -> PassState | None:
        """The first that is not finished; forgets those that are."""
        for pass_state in self:
            if not pass_state.finished:
                return pass_state
            pass_state.bound_plan.unfinished.discard(pass_state)
            self._known = tuple(known for known in self._known if known() not in (None, pass_state))
        return None

    def next_op(self) -> tuple[PassState, int] | None:
        """The op to issue now, if there is one: those of an earlier pass come first."""
        pass_state = next((p for p in self if p.issued < p.ops), None)
        op = pass_state.next_op() if pass_state is not None else None
        return None if pass_state is None or op is None else (pass_state, op)

    def next_update(self) -> tuple[PassState, int] | None:
        """The pass and the bucket to update now, if there is one."""
        pass_state = self._first()
        bucket = pass_state.next_update() if pass_state is not None else None
        return None if pass_state is None or bucket is None else (pass_state, bucket)

    @property
    def in_flight(self) -> PassState | None:
        """The pass of the oldest op in flight."""
        return next((p for p in self if p.in_flight), None)

    @property
    def unsettled(self) -> PassState | None:
        """The first for which something is left to do before the training loop goes on."""
        return next((p for p in self if not p.settled), None)

    def where(self) -> str:
        """Where the training loop is, in words."""
        latest = self._latest() if self._latest is not None else None
        return "not in a step" if latest is None else latest.where()

    def note_owing(self) -> None:
        """To be called whenever one may have begun or ceased to owe others something."""
        self._owing = tuple(pass_state for pass_state in self if pass_state.owes)

    def clear(self) -> None:
        self._known = self._owing = ()
