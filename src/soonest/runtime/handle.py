"""What ``prioritize`` returns."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import Optimizer

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.planner.report import Report, explain
from soonest.core.timeline import Timeline
from soonest.runtime import agreement
from soonest.runtime.engine import ending, one_rank
from soonest.runtime.engine.detach import detach
from soonest.runtime.engine.engine import Engine
from soonest.runtime.engine.join import Uneven
from soonest.runtime.engine.one_rank import Alone
from soonest.runtime.optim import checkpoint
from soonest.runtime.optim.sharded_state import ShardedState
from soonest.runtime.tuning import plan_file
from soonest.runtime.tuning.autotuner import AutoTuner
from soonest.runtime.tuning.plan_sources import PlanSources
from soonest.writing import write_json

_ALL_CALL = "; every rank must call it, at the same point"


class Handle(Joinable):
    """A prioritized model and optimizer; ``prioritize`` makes it.

    It need not be kept: training goes on without it.
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
        self._engine = engine
        self._model = model
        self._optimizer = optimizer
        self._choice = choice
        self._learner = learner
        self._alone = alone
        self._parts: ShardedState | None = None
        if engine:
            _engines.add(engine)
            # At exit, what is in flight goes first.
            weakref.finalize(engine, engine.lane.close).atexit = False

    @property
    def plan(self) -> Plan | None:
        """The plan in use; None in a group of one rank and after ``detach``."""
        return self._engine.bound_plan.plan if self._engine else None

    @property
    def engine(self) -> Engine | None:
        """What runs the plan; None in a group of one rank and after ``detach``."""
        return self._engine

    @property
    def shards(self) -> bool:
        """Whether the optimizer's state is sharded over the ranks."""
        return self._engine is not None and self._engine.state.parts is not None

    @property
    def network(self) -> Network | None:
        """What reducing costs on these ranks, as calibrated; None in a group of one rank."""
        return self._choice.network if self._choice else None

    @property
    def settled(self) -> bool:
        """Whether the plan stays; on every rank after the same step.

        Before, some steps are observed, and several plans take turns. So it is again when steps
        have come to take another time for good.
        """
        return self._engine is None or self._engine.settled

    @property
    def history(self) -> tuple[str, ...]:
        """How the plan has changed so far, and why, one sentence each; the same on every rank.

        So are sentences on a rank that has come to be late, or no longer is. The first rank also
        logs them, to the logger ``soonest``. Plans that only have their turn are not named. Empty
        in a group of one rank and after ``detach``.
        """
        return tuple(self._engine.history) if self._engine else ()

    def save_plan(self, path: str | Path) -> None:
        """Writes the plan in use as JSON; ``prioritize(..., plan=path)`` then keeps to it.

        One rank is enough, and it waits for nobody. What is there is replaced, at once.

        Args:
            path: of the file.

        Raises:
            ValueError: there is no plan: in a group of one rank, or after ``detach``.
            OSError: the file cannot be written.
        """
        if self.plan is None:
            raise ValueError(
                "there is no plan to save in a group of one rank or after detach(): "
                "save it before, on several ranks"
            )
        plan_file.save(self.plan, path)

    def flush(self) -> None:
        """Waits until every parameter, gradient and optimizer state has its value.

        Nothing needs this to be right: whatever is read waits for itself.

        Raises:
            SoonestError: a rank was lost or an update failed.
        """
        if self._engine:
            self._engine.flush()

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward passes only accumulate gradients on their own rank.

        As with ``DistributedDataParallel.no_sync``, the first backward pass outside reduces what
        has been accumulated.
        """
        return self._engine.backward.no_sync() if self._engine else nullcontext()

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

    def timeline(self) -> Timeline | None:
        """The last step as measured on this rank; None before there is one.

        Its note says which rank is late, if one is.

        Once the plan has settled, only so many steps are measured that it costs a thousandth of
        the time.
        """
        timeline = self._engine.profiler.timeline() if self._engine else None
        if timeline is None or self._engine is None:
            return timeline
        return replace(timeline, note=self._engine.late or "")

    def save_profile(self, path: str | Path) -> None:
        """Writes what was measured of model and network, for ``soonest predict --profile``.

        It is JSON: a trace of the model, medians of this rank's last measured steps, with the
        calibrated network and the number of ranks in it.

        Args:
            path: of the file to write.

        Raises:
            ValueError: nothing has been measured, as in a group of one rank.
        """
        trace = self._engine.profiler.trace() if self._engine else None
        if not self._engine or trace is None:
            raise ValueError(
                "no step has been measured that could be saved: train some more steps, on two "
                "ranks or more, before detach()"
            )
        assert self._choice
        network, ranks = self._choice.network, self._engine.bound_plan.plan.ranks
        profile = {**trace.to_json(), "ranks": ranks, "network": network.to_json()}
        write_json(path, profile)

    def report(self) -> Report | None:
        """Why each bucket is reduced as it is, with predicted and measured times.

        Printed, it is a table. Predictions are of the calibrated network, at the pace seen in the
        last measured steps on this rank. The last line says which rank is late, if one is. In a
        group of one rank it says that there is nothing to send. None after ``detach``.
        """
        if not self._engine:
            return Report((), ("one rank: nothing to send",)) if self._alone else None
        assert self._choice
        calibrated, methods, given, notes = self._choice
        measured_s, pace = self._engine.profiler.measured(calibrated)
        return explain(
            self._engine.bound_plan.plan,
            calibrated.slowed(pace),
            choices=methods,
            measured_s=measured_s,
            given=given,
            notes=(*notes, *self._engine.history, self._engine.who_is_late),
        )

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

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
    ) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_`` on all of the model's gradients, on every rank.

        Where the optimizer's state is sharded over the ranks, so are gradients: then ranks only
        tell each other the norms of their parts, and every rank must call it.

        Args:
            max_norm: of all gradients together, after this.
            norm_type: which norm; may be infinity.
            error_if_nonfinite: raise an error if the norm is not finite.

        Returns:
            The norm before, a scalar.

        Raises:
            RuntimeError: the norm is not finite, and ``error_if_nonfinite`` is set.
        """
        engine = self._engine
        if engine and engine.state.parts is not None and not engine.backward.siblings:
            return engine.clip_grad_norm_(max_norm, norm_type, error_if_nonfinite)
        return torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), max_norm, norm_type, error_if_nonfinite
        )

    def detach(self) -> None:
        """Makes model and optimizer plain objects again, with all updates applied.

        Where the optimizer's state is sharded over the ranks, every rank must call it.

        Training may go on with them, on this rank alone. After a failure this waits for nobody, the
        parameters keep the values that they have, and a warning says which of them lack what. Where
        the optimizer's state is sharded, ``local_optimizer_state`` then has this rank's part.
        Calling it again does nothing.

        Raises:
            SoonestError: something has failed that nobody has been told of yet. Model and optimizer
                are plain objects all the same.
        """
        if self._alone:
            self._alone.detach()
            self._alone = None
        if self._engine:
            engine, self._engine = self._engine, None
            _engines.discard(engine)
            try:
                detach(engine)
            finally:
                self._parts = engine.state.parts


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def is_shared(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether gradients of any of these are reduced already."""
    given = list(parameters)
    mine = {id(parameter) for parameter in given}
    return one_rank.holds_any(given) or any(
        id(param.parameter) in mine for engine in _engines for param in engine.layout.params
    )


@atexit.register
def _finish() -> None:
    """A script that ends still owes the other ranks its part of what is in flight."""
    ending.finish(list(_engines))
