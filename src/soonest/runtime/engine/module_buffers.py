"""Buffers, such as BatchNorm's running statistics: every rank gets those of the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from soonest.errors import SoonestError
from soonest.runtime import comm
from soonest.runtime.comm import Group, Sent, ended, waiting
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.engine.sent_buffers import Broadcast, BufferSet
from soonest.runtime.execute.lane import Lane
from soonest.runtime.guard import modes
from soonest.runtime.guard.pending import DisableGuard

_AFTER_BACKWARD, _BEFORE_FORWARD = 0, 1
"""When buffers were sent."""


class Buffers:
    """A model's buffers.

    As with ``DistributedDataParallel``, every rank gets the first one's before a forward pass, if
    the one before it was to be followed by a backward pass that is synchronized. They are sent
    early, at the end of that backward pass, so they are there when the forward pass begins, and it
    is no collective call: one rank may evaluate by itself. Only where a rank sees that its own have
    changed meanwhile, as they do in two forward passes in a row, are they sent at that moment.

    A short head precedes them, which says what follows; see ``Broadcast``.

    Args:
        model: whose.
        group: makes one of all ranks, for nothing else; a collective call.
        lane: knows if something else has failed, and who is to see them.
        failures: who the ranks are.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Callable[[], Group],
        lane: Lane,
        failures: FailureReporter,
    ) -> None:
        self._model = model
        self._make_group = group
        self._group: Group | None = None
        self._lane = lane
        self._failures = failures
        self._sent: Broadcast | None = None
        self._needed = True
        self._step = 0
        self._model_is_called = False
        self._now = BufferSet({})
        self.look()

    def look(self) -> None:
        """Takes the model as it is now, the same on all ranks by now."""
        self._agreed = self._present()
        self._seen = self._agreed.state()
        if self._agreed.buffers and self._group is None:
            self._group = self._make_group()

    def _present(self) -> BufferSet:
        """Those that the model has now."""
        buffers = dict(self._model.named_buffers())
        if not self._now.consists_of(buffers):
            try:
                self._now = BufferSet(buffers)
            except ValueError as error:
                raise self._failures.at_fault(error) from None
        return self._now

    def anew(self) -> None:
        """Gives all ranks the first one's, in a model that has changed; a collective call."""
        self.wait_sent()
        self._sent = None
        now = self._present()
        if now.buffers and self._group is None:
            self._group = self._make_group()
        if self._group is not None:
            self._send_now(now)
            self._seen = now.state()

    def share(self, step: int, *, active: bool | None = None) -> None:
        """Sends them, at the end of a backward pass; every rank must call it.

        Args:
            step: the number of that pass.
            active: this rank has had a forward pass, where not all may have: then those of the last
                rank that has are sent.
        """
        if self._group is None or not self._agreed.buffers:
            return
        self._step = step
        self.wait_sent()
        now = self._present()
        with self._carefully():
            source = 0 if active is None else comm.last_of(self._group, mine=active)
            self._sent = Broadcast(self._group, source, _AFTER_BACKWARD, now, self._agreed)
        self._seen = now.state()
        if not self._model_is_called:  # but parts of it, so that no forward pass is seen to begin
            self._give_out()

    def forward_begins(self, step: int) -> None:
        """Every rank now has those of the first one, if they are due.

        Args:
            step: the number of the backward pass that follows.
        """
        if self._sent is None:  # otherwise what is waited for belongs to the step before
            self._step = step
        self._model_is_called = True
        if self._group is not None and self._needed:
            self._give_out()

    def _give_out(self) -> None:
        sent, self._sent = self._sent, None
        now = self._present()
        changed = now.state() != self._seen
        if sent is not None:
            self._wait(sent)
            self._compare(sent, _AFTER_BACKWARD)
            changed = changed or sent.now.signature != self._agreed.signature
        if changed:
            self._send_now(now)
        elif sent is not None:
            self._take(sent.values)
        self._seen = now.state()

    def forward_ended(self, *, synchronizing: bool) -> None:
        """Whether to share them before the next one, too.

        Args:
            synchronizing: this one will be followed by a backward pass that is synchronized.
        """
        self._needed = synchronizing

    def _send_now(self, now: BufferSet) -> None:
        """Sends them as they are; every rank must do so at the same point."""
        assert self._group
        with self._carefully():
            head = Broadcast(self._group, 0, _BEFORE_FORWARD, now, None)
        self._wait(head)
        self._compare(head, _BEFORE_FORWARD)
        self._agreed = now
        with self._carefully():
            comm.broadcast(self._group, list(now.buffers.values()))

    def _compare(self, sent: Broadcast, when: int) -> None:
        """Raises SoonestError if this rank's buffers, or the moment, are others than sent."""
        if sent.when != when:
            there, here = (
                self._failures.names[sent.source],
                self._failures.names[self._failures.rank],
            )
            odd, other = (here, there) if when == _BEFORE_FORWARD else (there, here)
            raise self._failures.at_fault(
                SoonestError(
                    f"{odd} has changed its buffers between two steps, perhaps by a forward pass "
                    f"without a backward pass, and {other} has not, so they cannot be sent: do the "
                    "same on every rank, or leave buffers out with broadcast_buffers=False"
                )
            )
        if sent.signature != sent.now.signature:
            raise self._failures.at_fault(
                SoonestError(
                    "the first rank has other buffers than this one: "
                    f"{sent.now.difference(self._agreed)}. Give every rank the same, or leave them "
                    "out with broadcast_buffers=False"
                )
            )

    def _take(self, values: Sequence[Sent]) -> None:
        """Overwrites them by what has been sent."""
        with self._carefully():
            for part in values:
                part.unpack()
            self._lane.spread(part.memory for part in values)

    def wait_sent(self) -> None:
        """Waits until nothing is under way that other ranks need."""
        if self._sent is not None:
            self._wait(self._sent)

    def _wait(self, sent: Broadcast) -> None:
        with self._carefully():
            for part in sent.under_way():
                if part.on_device:
                    part.work.wait()  # lets the current stream wait, and not the host
                else:
                    with waiting():
                        while not ended(part.work):
                            self._lane.check()

    @contextmanager
    def _carefully(self) -> Iterator[None]:
        """Says who is missing if a rank does not take part; or what else has failed before."""
        with (
            self._failures.together(f"step {self._step}: sending the first rank's buffers"),
            torch.no_grad(),
            DisableGuard(),
            modes.usual(),
        ):
            try:
                yield
            except RuntimeError:
                self._lane.check()
                raise

    def drop(self) -> None:
        """Leaves them as they are."""
        self._sent = None
