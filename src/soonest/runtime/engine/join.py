"""Ranks without further input take part in what the others reduce."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from soonest.runtime import comm
from soonest.runtime.engine.engine import Engine
from soonest.runtime.guard import pending


class Uneven(JoinHook):
    """What one engine does in a ``torch.distributed.algorithms.join.Join``.

    Args:
        engine: takes part.
        model: whose parameters it reduces.
        joinable: what was given to ``Join``.
        divide_by_all: gradients are divided by the number of all ranks, not of those with input.
    """

    def __init__(
        self, engine: Engine, model: nn.Module, joinable: Joinable, *, divide_by_all: bool
    ) -> None:
        self._engine = engine
        self._model = model
        self._joinable = joinable
        self._divide_by_all = divide_by_all
        self._ranks = engine.ranks.group.size()
        engine.backward.uneven = self

    @property
    def enabled(self) -> bool:
        """Whether ranks may run out of input now."""
        return self._joinable._join_config.enable

    def all_are_active(self) -> bool:
        """Called by a rank that has input: whether all have; a collective call."""
        if not self.enabled:
            return True
        Join.notify_join_context(self._joinable)
        active = self._count(1.0)
        self._engine.gradients.divide_by(self._ranks if self._divide_by_all else active)
        return active == self._ranks

    def _count(self, mine: float) -> int:
        """How many ranks have input."""
        total = torch.tensor([mine])
        comm.sum_small(self._joinable.join_process_group, total)
        return round(total.item())

    def main_hook(self) -> None:
        self._count(0.0)
        self._engine.contribute_nothing()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Every rank goes on with what the last one has come to."""
        engine = self._engine
        engine.flush()
        with pending.DisableGuard():
            tensors = [*self._model.parameters(), *self._model.buffers()]
            comm.broadcast_of(engine.ranks.group, tensors, mine=is_last_joiner)
        engine.backward.uneven = None
        engine.gradients.divide_by(self._ranks)
