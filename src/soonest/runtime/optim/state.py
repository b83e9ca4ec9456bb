"""The optimizer's state: whole on every rank, or sharded."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.core.plan import Plan
from soonest.errors import SoonestError
from soonest.runtime.comm import Ranks, Wire
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.bystanders import States
from soonest.runtime.optim.sharded_state import ShardedState


class OptimizerState:
    """The state of one optimizer, whole or sharded.

    Args:
        optimizer: the user's own.
        cls: its class as the user made it.
        sharing: over which to shard it, if plans do.
        wire: how parameters are sent then.
        failures: who the ranks are.

    Attributes:
        parts: this rank's shards of it, if it is sharded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cls: type[Optimizer],
        sharing: Ranks | None,
        wire: Wire,
        failures: FailureReporter,
    ) -> None:
        self._optimizer = optimizer
        self._cls = cls
        self._wire = wire
        self._failures = failures
        self._sharing = sharing
        self._layout: FlatBuffers | None = None
        self.parts: ShardedState | None = None
        self._states = States(optimizer.__dict__)

    def __repr__(self) -> str:
        return f"OptimizerState({self._cls.__name__}, {self.parts or 'whole'})"

    def bind(self, layout: FlatBuffers, plan: Plan) -> None:
        """Shards the state as this plan does; a collective call if that changes."""
        self._layout = layout
        if self.parts is not None:
            self.parts.move(plan, layout)
        elif plan.sharded:
            assert self._sharing is not None
            self.parts = ShardedState(self._sharing, plan, layout, self._failures, self._wire)
            self.adopt()

    def adopt(self) -> None:
        """Keeps this rank's shards of whole states that have been put into ``optimizer.state``."""
        if self.parts is not None:
            self.parts.adopt(self._optimizer.__dict__["state"])

    def note_given(self) -> None:
        """Notes that the user has been given ``optimizer.state``, or has replaced it."""
        self._states.given()

    def note_loaded(self) -> None:
        """Notes that what is in ``optimizer.state`` now comes from a checkpoint."""
        self._states.loaded()

    def is_kept(self, *, names: int) -> bool:
        """Whether the user may read it without asking the optimizer for it.

        Args:
            names: see ``States.are_kept``.
        """
        return self.parts is None and self._states.are_kept(names=names)

    def check(self) -> None:
        """Raises SoonestError if the state is not all in ``optimizer.state``."""
        if self.parts is not None:
            raise SoonestError(
                f"the state of this {self._cls.__name__} is sharded over "
                f"{self.parts.ranks.group.size()} ranks (shard_optimizer=True): call "
                "handle.optimizer_state_dict(), or handle.state_dict() for torch.distributed."
                "checkpoint, on every rank instead, which gathers it; or, where a step() asks that "
                "was kept or wrapped before prioritize, call optimizer.step() itself"
            )

    def plain_optimizer(self) -> Optimizer:
        """An optimizer of the user's class with all state; a collective call if that is sharded.

        Groups are the user's own, and states too, unless they are sharded.
        """
        plain: Any = object.__new__(self._cls)
        plain.__dict__.update(self._optimizer.__dict__)
        plain.__dict__.pop("step", None)  # a scheduler's, which leads back to the user's own
        if self.parts is not None:
            assert self._layout is not None
            by_name = {param.name: param.parameter for param in self._layout.params}
            whole = {by_name[name]: values for name, values in self.parts.whole().items()}
            plain.state = defaultdict(dict, {**plain.state, **whole})
        return plain

    def take(self, plain: Optimizer) -> None:
        """Goes on with the state and the groups of what ``plain_optimizer`` has made."""
        self._optimizer.__dict__["state"] = plain.__dict__["state"]
        self._optimizer.__dict__["param_groups"] = plain.__dict__["param_groups"]
        self.note_loaded()
        self.adopt()
        if self.parts is not None:
            self.parts.restart()

    def exact_parameters(self) -> dict[nn.Parameter, Tensor]:
        """The exact values of parameters that are sent rounded; collective if there are any."""
        return self.parts.exact_parameters() if self.parts is not None else {}

    def hand_back(self) -> None:
        """Makes ``optimizer.state`` whole, and parameters exact; collective if it is sharded."""
        if self.parts is not None:
            with torch.no_grad():
                for parameter, exact in self.exact_parameters().items():
                    parameter.copy_(exact)
            self._optimizer.__dict__["state"] = self.plain_optimizer().__dict__["state"]
            self.parts = None
