"""What of a handle has to do with which backward passes are synchronized, and by how many ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from soonest.runtime.engine.join import Uneven
from soonest.runtime.handle.base import Prioritized


class Joining(Prioritized, Joinable):
    """Ranks that may have different numbers of steps, and passes that stay on one rank."""

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Join:
        """Within this context ranks may have different numbers of steps.

        As ``DistributedDataParallel.join``: a rank that has left it takes part in what the others
        reduce until all have, and then every rank has the parameters of the last. The handle can
        also be given to ``torch.distributed.algorithms.join.Join``, beside others.

        Args:
            divide_by_initial_world_size: divide gradients by the number of all ranks, not of those
                that still have input.
            enable: ranks may differ; otherwise this does nothing.
            throw_on_early_termination: raise an error on all ranks when the first one has left.

        Raises:
            ValueError: state is sharded over the ranks, or the model has several optimizers.
        """
        return Join(
            [self],
            enable,
            throw_on_early_termination,
            divide_by_initial_world_size=divide_by_initial_world_size,
        )

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What ``Join`` calls on a rank without further input."""
        if not self._engine:
            return JoinHook()
        if self.shards or self._engine.backward.siblings:
            raise ValueError(
                "join() was called, but ranks that shard the optimizer's state, or train a "
                "model with several optimizers, must all step equally often: give every rank as "
                "many batches"
            )
        divide_by_all = kwargs.get("divide_by_initial_world_size", True)
        return Uneven(self._engine, self._model, self, divide_by_all=divide_by_all)

    @property
    def join_device(self) -> torch.device:
        return next(self._model.parameters()).device

    @property
    def join_process_group(self) -> Any:
        return self._group

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward passes only accumulate gradients on their own rank.

        As with ``DistributedDataParallel.no_sync``, the first backward pass outside reduces what
        has been accumulated.
        """
        return self._engine.backward.no_sync() if self._engine else nullcontext()
