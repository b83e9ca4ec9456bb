"""What ``prioritize`` returns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.planner.report import Report, explain
from soonest.core.timeline import Timeline
from soonest.runtime.engine.detach import detach
from soonest.runtime.handle.base import forget
from soonest.runtime.handle.checkpoints import Checkpoints
from soonest.runtime.handle.joining import Joining
from soonest.runtime.tuning import plan_file
from soonest.writing import write_json


class Handle(Checkpoints, Joining):
    """A prioritized model and optimizer; ``prioritize`` makes it.

    It need not be kept: training goes on without it.
    """

    @property
    def plan(self) -> Plan | None:
        """The plan in use; None in a group of one rank and after ``detach``."""
        return self._engine.bound_plan.plan if self._engine else None

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
        assert self._choice is not None
        calibrated = self._choice.network
        measured_s, pace = self._engine.profiler.measured(calibrated)
        return explain(
            self._engine.bound_plan.plan,
            calibrated.slowed(pace),
            choices=self._choice.methods,
            measured_s=measured_s,
            given=self._choice.given,
            notes=(*self._choice.notes, *self._engine.history, self._engine.who_is_late),
        )

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
            forget(engine)
            try:
                detach(engine)
            finally:
                self._parts = engine.state.parts
