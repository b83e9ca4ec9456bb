"""Buffers, such as BatchNorm's running statistics: every rank gets those of the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from soonest.runtime import collectives, guard, modes
from soonest.runtime.collectives import Group, Sent, ended
from soonest.runtime.lanes import Lane
from soonest.runtime.peers import Peers


class Buffers:
    """A model's buffers.

    They are sent at the end of every backward pass that is combined, and are there before the next
    forward pass, which sees the same as with ``DistributedDataParallel``. In between, who reads one
    waits for it. No forward pass is a collective call, so one rank may evaluate by itself.

    Args:
        model: whose.
        group: makes one of all ranks, for nothing else; a collective call.
        lane: knows if something else has failed, and who is to see them.
        peers: who the ranks are.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Callable[[], Group],
        lane: Lane,
        peers: Peers,
    ) -> None:
        self._make_group = group
        self._group: Group | None = None
        self._lane = lane
        self._peers = peers
        self._sent: list[Sent] = []
        self._holds: list[guard.Hold] = []
        self.look(model)

    def look(self, model: nn.Module) -> None:
        """Finds them in the model as it is now; a collective call."""
        self._places = list(
            {
                id(buffer): (module._buffers, name)
                for module in model.modules()
                for name, buffer in module._buffers.items()
                if buffer is not None
            }.values()
        )
        if self._places and self._group is None:
            self._group = self._make_group()

    def share(self, *, active: bool | None = None) -> None:
        """Sends them; every rank must call it.

        Args:
            active: this rank has had a forward pass, where not all may have: then those of the last
                rank that has are sent.
        """
        if self._group is None:
            return
        self.land()
        # They may have been replaced.
        found = [buffer for names, key in self._places if (buffer := names.get(key)) is not None]
        with self._blaming(), torch.no_grad(), guard.DisableGuard(), modes.usual():
            source = 0 if active is None else collectives.last_of(self._group, mine=active)
            self._sent = collectives.start_broadcast(self._group, found, source)
        if self._group.rank() != source:
            self._holds = [guard.Hold(buffer, self.land) for buffer in found]
            for hold in self._holds:
                hold.take_off()

    def land(self) -> None:
        """Waits until all have arrived."""
        sent, self._sent = self._sent, []
        if not sent:
            return
        with self._blaming(), torch.no_grad(), guard.DisableGuard(), modes.usual():
            for part in sent:
                if part.on_device:
                    part.work.wait()  # lets the current stream wait, and not the host
                else:
                    while not ended(part.work):
                        self._lane.check()
                part.unpack()
            self._lane.spread(part.memory for part in sent)
        self.drop()

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Says who is missing if a rank does not take part; or what else has failed before."""
        with self._peers.together("sharing the first rank's buffers"):
            try:
                yield
            except RuntimeError:
                self._lane.check()
                raise

    def drop(self) -> None:
        """Leaves them as they are."""
        for hold in self._holds:
            hold.release()
        self._holds, self._sent = [], []
