"""What of a handle saves and loads the state of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from soonest.runtime import agreement
from soonest.runtime.handle.base import Prioritized
from soonest.runtime.optim import checkpoint

_ALL_CALL = "; every rank must call it, at the same point"


class Checkpoints(Prioritized):
    """The state of a model and its optimizer, whole or this rank's part of it."""

    def local_optimizer_state(self) -> dict[Any, dict[str, Any]]:
        """This rank's own part of the optimizer's state; all of it if that is not sharded.

        After a failure this is what is left of it, also after ``detach``.

        Returns:
            State by parameter; or, where it is sharded, by name, first and last but one element
            of a part of a parameter, in the order of memory.
        """
        if self._engine is None or self._engine.lane.error is None:
            self.flush()
        parts = self._engine.state.parts if self._engine else self._parts
        return dict(parts.parts) if parts is not None else dict(self._optimizer.state)

    def optimizer_state_dict(self) -> dict[str, Any]:
        """What ``optimizer.state_dict()`` would return without soonest, on every rank.

        Where the state is sharded over the ranks this gathers it, and every rank must call it.
        ``optimizer.load_state_dict()`` takes it, with or without soonest, on any number of ranks.
        """
        return self._plain_optimizer().state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer for ``torch.distributed.checkpoint``; every rank must call it.

        With ``load_state_dict`` this makes a handle something that it saves and loads as it is::

            dcp.save({"training": handle}, checkpoint_id=folder)
            dcp.load({"training": handle}, checkpoint_id=folder)

        A checkpoint fits any number of ranks, and what ``get_state_dict(model, optimizer)`` of
        ``torch.distributed.checkpoint.state_dict`` gives without soonest. While it is made, every
        rank holds all of the optimizer's state.

        Returns:
            ``{"model": ..., "optim": ...}``, with names of parameters as keys.
        """
        plain = self._plain_optimizer()
        exact = self._engine.state.exact_parameters() if self._engine else {}
        return checkpoint.form_of(self._model, plain, exact)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave, here or elsewhere; every rank must call it.

        If one rank cannot take it, all raise.

        Raises:
            ValueError: it does not fit the model or the optimizer.
        """
        plain = self._plain_optimizer()
        self._agree(lambda: checkpoint.check(self._model, state_dict))
        self._agree(lambda: checkpoint.take(self._model, plain, state_dict))
        if self._engine:
            self._engine.state.take(plain)
            assert self._learner
            with self._engine.failures.together("load_state_dict()", _ALL_CALL):
                self._learner.resume(self._engine)

    def _agree(self, act: Callable[[], None]) -> None:
        """Does something that may raise; if it does on one rank, all raise. A collective call."""
        refused: Exception | None = None
        try:
            act()
        except Exception as error:
            refused = error
        elsewhere = None
        if self._engine:
            with self._engine.failures.together("load_state_dict()", _ALL_CALL):
                elsewhere = agreement.first_refusal(self._engine.ranks.group, refused)
        if refused:
            raise refused
        if elsewhere:
            raise ValueError(elsewhere)

    def _plain_optimizer(self) -> Optimizer:
        self.flush()
        return self._engine.state.plain_optimizer() if self._engine else self._optimizer
