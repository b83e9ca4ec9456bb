"""The optimizer's state: whole on every rank, or in parts."""

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
    """The state of one optimizer, wherever it is.

    Args:
        optimizer: the user's own.
        cls: its class as the user made it.
        sharing: over which to share it out, if plans shard.
        wire: how parameters are then sent.
        failures: who the ranks are.

    Attributes:
        parts: this rank's, if it is shared out.
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

    def bind(self, layout: FlatBuffers, plan: Plan) -> None:
        """From now on the plan says whose part is what; collective if that changes."""
        self._layout = layout
        if self.parts is not None:
            self.parts.move(plan, layout)
        elif plan.sharded:
            assert self._sharing is not None
            self.parts = ShardedState(self._sharing, plan, layout, self._failures, self._wire)
            self.adopt()

    def adopt(self) -> None:
        """Keeps this rank's parts of whole states that have been put into ``optimizer.state``."""
        if self.parts is not None:
            self.parts.adopt(self._optimizer.__dict__["state"])

    def note_given(self) -> None:
        """The user has been given ``optimizer.state``, or has put another there."""
        self._states.given()

    def note_loaded(self) -> None:
        """What is in ``optimizer.state`` now comes from a checkpoint."""
        self._states.loaded()

    def is_kept(self, *, names: int) -> bool:
        """Whether the user may read it without asking the optimizer for it.

        Args:
            names: see ``States.are_kept``.
        """
        return self.parts is None and self._states.are_kept(names=names)

    def check(self) -> None:
        """Raises if it is not all in ``optimizer.state``."""
        if self.parts is not None:
            raise SoonestError(
                f"the state of this {self._cls.__name__} is shared out over "
                f"{self.parts.ranks.group.size()} ranks (shard_optimizer=True): call "
                "handle.optimizer_state_dict(), or handle.state_dict() for torch.distributed."
                "checkpoint, on every rank instead, which gathers it; or, where a step() asks that "
                "was kept or wrapped before prioritize, call optimizer.step() itself"
            )

    def plain_optimizer(self) -> Optimizer:
        """One of the user's class with all state; a collective call if that is shared out.

        Groups are the user's own, and states too, unless they are shared out.
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
        """Goes on with the state and the groups of such an optimizer."""
        self._optimizer.__dict__["state"] = plain.__dict__["state"]
        self._optimizer.__dict__["param_groups"] = plain.__dict__["param_groups"]
        self.note_loaded()
        self.adopt()
        if self.parts is not None:
            self.parts.restart()

    def exact_parameters(self) -> dict[nn.Parameter, Tensor]:
        """Those that the model has rounded, as they are; a collective call if there are any."""
        return self.parts.exact_parameters() if self.parts is not None else {}

    def hand_back(self) -> None:
        """Makes ``optimizer.state`` whole, and parameters exact; collective if it is shared out."""
        if self.parts is not None:
            with torch.no_grad():
                for parameter, exact in self.exact_parameters().items():
                    parameter.copy_(exact)
            self._optimizer.__dict__["state"] = self.plain_optimizer().__dict__["state"]
            self.parts = None
