"""What a handle refers to, and what every part of it needs."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from soonest.runtime.engine import ending, one_rank
from soonest.runtime.engine.engine import Engine
from soonest.runtime.engine.one_rank import Alone
from soonest.runtime.optim.sharded_state import ShardedState
from soonest.runtime.tuning.autotuner import AutoTuner
from soonest.runtime.tuning.plan_sources import PlanSources


class Prioritized:
    """A model and an optimizer that are trained by priority.

    Args:
        model, optimizer: the user's own.
        group: of the user's, over which they are trained.
        engine: runs the plan; None in a group of one rank.
        choice: what the plan could choose from.
        learner: selects the plan.
        alone: stands for the engine in a group of one rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        group: dist.ProcessGroup,
        engine: Engine | None = None,
        choice: PlanSources | None = None,
        learner: AutoTuner | None = None,
        alone: Alone | None = None,
    ) -> None:
        super().__init__()
        self._group = group
        self._engine: Engine | None = engine
        self._model = model
        self._optimizer = optimizer
        self._choice: PlanSources | None = choice
        self._learner = learner
        self._alone: Alone | None = alone
        self._parts: ShardedState | None = None
        if engine:
            _engines.add(engine)
            # At exit, what is in flight goes first.
            weakref.finalize(engine, engine.lane.close).atexit = False

    def __repr__(self) -> str:
        what = f"{type(self).__name__} of {type(self._model).__name__}"
        if self._engine is None:
            return f"<{what}: {'one rank' if self._alone else 'detached'}>"
        plan, state = self._engine.bound_plan.plan, "settled" if self._engine.settled else "tuning"
        return f"<{what}: {plan.ranks} ranks, {len(plan.buckets)} buckets, {state}>"

    @property
    def engine(self) -> Engine | None:
        """What runs the plan; None in a group of one rank and after ``detach``."""
        return self._engine

    @property
    def shards(self) -> bool:
        """Whether the optimizer's state is sharded over the ranks."""
        return self._engine is not None and self._engine.state.parts is not None

    def flush(self) -> None:
        """Waits until every parameter, gradient and optimizer state has its value.

        Nothing needs this to be right: whatever is read waits for itself.

        Raises:
            SoonestError: a rank was lost or an update failed.
        """
        if self._engine:
            self._engine.flush()


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def is_shared(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether gradients of any of these are reduced already."""
    given = list(parameters)
    mine = {id(parameter) for parameter in given}
    return one_rank.holds_any(given) or any(
        id(param.parameter) in mine for engine in _engines for param in engine.layout.params
    )


def forget(engine: Engine) -> None:
    """It has been detached: the end of the process need not wait for it."""
    _engines.discard(engine)


@atexit.register
def _finish() -> None:
    """A script that ends still owes the other ranks its part of what is in flight."""
    ending.finish(list(_engines))
