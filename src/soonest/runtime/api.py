"""The one added line, and what it returns."""

from __future__ import annotations

import atexit
import json
import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.core.explain import Report, explain
from soonest.core.network import Network
from soonest.core.plan import Plan, first_difference, shards
from soonest.core.planner import first_plan
from soonest.core.timeline import Timeline
from soonest.runtime import agree, calibrate, checkpoint, collectives, update
from soonest.runtime.checks import check, check_options
from soonest.runtime.engine import Engine
from soonest.runtime.lanes import ThreadLane
from soonest.runtime.layout import Layout
from soonest.runtime.learn import Learner
from soonest.runtime.peers import Peers

WINDOW = 2
"""Ops in flight: the second hides the latency of the first; more would only blur the order."""


class _Choice(NamedTuple):
    """What a plan could choose from.

    Args:
        network: as calibrated.
        methods: that it may use.
        given: why it could not choose, if so.
        notes: for the report.
    """

    network: Network
    methods: tuple[str, ...]
    given: str | None = None
    notes: tuple[str, ...] = ()


class Handle:
    """A prioritized model and optimizer; ``prioritize`` makes it.

    It need not be kept: training goes on without it.
    """

    def __init__(
        self,
        engine: Engine | None,
        model: nn.Module,
        optimizer: Optimizer,
        choice: _Choice | None = None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._optimizer = optimizer
        self._choice = choice or _Choice(Network.linear(0.0, 1.0), ())

    @property
    def plan(self) -> Plan | None:
        """The plan in use; None in a group of one rank and after ``detach``."""
        return self._engine.program.plan if self._engine else None

    @property
    def settled(self) -> bool:
        """Whether the plan stays; on every rank after the same step.

        Before, the first steps are observed, and several plans may take turns.
        """
        return self._engine is None or self._engine.settled

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

        As with ``DistributedDataParallel.no_sync``, the first backward pass outside combines what
        has been accumulated.
        """
        return self._engine.no_sync() if self._engine else nullcontext()

    def timeline(self) -> Timeline | None:
        """The last step as measured on this rank; None before there is one.

        Once the plan has settled, only so many steps are measured that it costs a thousandth of
        the time.
        """
        return self._engine.timeline() if self._engine else None

    def report(self) -> Report | None:
        """Why each bucket is combined as it is, with predicted and measured times.

        Printed, it is a table. Predictions are of the calibrated network, at the pace seen in the
        last measured steps on this rank. None in a group of one rank and after ``detach``.
        """
        if not self._engine:
            return None
        calibrated, methods, given, notes = self._choice
        measured_s, pace = self._engine.measured(calibrated)
        return explain(
            self._engine.program.plan,
            calibrated.slowed(pace),
            choices=methods,
            measured_s=measured_s,
            given=given,
            notes=notes,
        )

    def local_optimizer_state(self) -> dict[Any, dict[str, Any]]:
        """This rank's own part of the optimizer's state; all of it if that is not shared out.

        Returns:
            State by parameter; or, where it is shared out, by name, first and last but one element
            of a part of a parameter, in the order of memory.
        """
        self.flush()
        parts = self._engine.state.parts if self._engine else None
        return dict(parts.parts) if parts is not None else dict(self._optimizer.state)

    def optimizer_state_dict(self) -> dict[str, Any]:
        """What ``optimizer.state_dict()`` would return without soonest, on every rank.

        Where the state is shared out over the ranks this gathers it, and every rank must call it.
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

        Raises:
            ValueError: it has no model or no optimizer in it.
        """
        plain = self._plain_optimizer()
        checkpoint.take(self._model, plain, state_dict)
        if self._engine:
            self._engine.state.take(plain)

    def _plain_optimizer(self) -> Optimizer:
        self.flush()
        return self._engine.state.plain_optimizer() if self._engine else self._optimizer

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
    ) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_`` on all of the model's gradients, on every rank.

        Where the optimizer's state is shared out over the ranks, so are gradients: then ranks only
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
        if self._engine and self._engine.state.parts is not None:
            return self._engine.clip_grad_norm_(max_norm, norm_type, error_if_nonfinite)
        return torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), max_norm, norm_type, error_if_nonfinite
        )

    def detach(self) -> None:
        """Makes model and optimizer plain objects again, with all updates applied.

        Where the optimizer's state is shared out over the ranks, every rank must call it.

        Training may go on with them, on this rank alone. After a failure the parameters keep the
        values that they have. Calling it again does nothing.
        """
        if self._engine:
            engine, self._engine = self._engine, None
            _engines.discard(engine)
            engine.detach()


def prioritize(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    process_group: dist.ProcessGroup | None = None,
    timeout_s: float | None = None,
    plan: Plan | str | Path | None = None,
    separable: bool | None = None,
    method: str | None = None,
    shard_optimizer: bool = False,
    wire_dtype: torch.dtype | None = None,
    parameter_wire_dtype: torch.dtype | None = None,
) -> Handle:
    """Trains ``model`` data-parallel, sending first what the next forward pass needs first.

    Model and optimizer stay the same objects and are changed in place; the training loop stays as
    it is. The parameters and buffers of the group's first rank are copied to all. The first step
    observes the model; from then on gradients are combined, parameters updated and forward passes
    run overlapped, by a plan that is the same on every rank. Every rank must call this, at the same
    point.

    Args:
        model: on CPU; its trainable parameters, of any floating dtype, become views of flat
            buffers.
        optimizer: holds parameters of ``model`` only. Trainable parameters that it does not hold
            are combined but not updated.
        process_group: over which to combine; the default group if None.
        timeout_s: how long a collective may take, seconds; torch's own default if None (30
            minutes).
        plan: a plan, or the path of one as JSON, to use instead of making one.
        separable: whether the optimizer updates each parameter by itself, looking at nothing but
            that parameter, its gradient, its state and its group's settings. None means: yes for
            the optimizers of ``torch.optim`` that do, no for any other class. Where it is not, all
            parameters are updated together inside ``optimizer.step()``, and only the backward pass
            is overlapped.
        method: combine every bucket so, a key of ``soonest.METHODS``, instead of choosing the
            cheapest by size.
        shard_optimizer: let each rank update only its part of every bucket, and keep only the
            optimizer state of that, if the optimizer is known to update each element by itself;
            others are not sharded, and a warning says so. Then gradients may be read only between
            ``backward()`` and ``step()``, and on every rank, as that gathers them.
        wire_dtype: ``torch.bfloat16`` or ``torch.float16``: send gradients so, half as many bytes.
            What each rank contributes, and the sums, are rounded to it. In float16 gradients
            divided by the number of ranks must stay below 65504.
        parameter_wire_dtype: the same for the parameters that ranks send each other under
            ``shard_optimizer=True``; exactly if None. The model then has rounded parameters, the
            same on every rank, and each rank keeps the exact ones of its part, which it updates
            and which ``handle.state_dict()`` saves.

    Returns:
        A handle; it need not be kept.

    Raises:
        ValueError: the model or the optimizer is not fit for this; the message says what to do.
        PlanMismatchError: the ranks have different models or plans.
    """
    check(model, optimizer)
    wire = collectives.Wire(wire_dtype, parameter_wire_dtype)
    check_options(method, wire, shard_optimizer=shard_optimizer)
    given = _loaded(plan)
    parent = process_group if process_group is not None else dist.group.WORLD
    assert parent is not None
    if parent.size() == 1:
        return Handle(None, model, optimizer)
    group = collectives.private_group(parent, timeout_s)
    ranks = collectives.ranks_of(group)
    notes = _notes(optimizer, shard_optimizer, group.size())
    sharded = shard_optimizer and _can_shard(optimizer, separable)
    methods = _methods(method, ranks, sharded=sharded)
    sharing = collectives.Ranks(ranks.second, ranks.second) if sharded else None
    peers = Peers(group)
    order = [slot.name for flat in given.flats for slot in flat.slots] if given else []
    agree.agree_on_model(group, model)
    layout = Layout(model, order)
    lane = ThreadLane(timeout_s=collectives.timeout_of(group), blame=peers.blame)
    try:
        if given is not None:
            if wrong := _misfit(given, layout, group.size()):
                raise ValueError(f"the plan is not for this model and group: {wrong} (plan / here)")
            for name in {bucket.method for bucket in given.buckets}:
                _methods(name, ranks, sharded=sharded)
        collectives.broadcast(group, [*layout.parameters, *_others(model, layout)])
        network = calibrate.network_of(
            ranks, methods=methods, device=layout.parameters[0].device, wire=wire
        )
        first = given or first_plan(
            layout.flats, network, ranks=group.size(), window=WINDOW, methods=methods
        )
        agree.agree_on_plan(group, first)
        learner = Learner(network, window=WINDOW, methods=methods)
        engine = Engine(
            model,
            optimizer,
            separable=update.is_separable(optimizer) if separable is None else separable,
            layout=layout,
            plan=first,
            ranks=ranks,
            lane=lane,
            sharing=sharing,
            wire=wire,
            after_step=learner if given is None else _nothing,
        )
    except BaseException:
        lane.close()
        layout.move_out()
        raise
    engine.settled = given is not None
    _engines.add(engine)
    weakref.finalize(engine, lane.close).atexit = False  # at exit, what is in flight goes first
    asked = f"method={method!r} was asked for" if method else None
    why = "as the given plan says" if given is not None else asked
    return Handle(engine, model, optimizer, _Choice(network, methods, why, tuple(notes)))


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _finish() -> None:
    """A script that ends still owes the other ranks its part of what is in flight."""
    for engine in list(_engines):
        if engine.lane.error is None:
            engine.lane.wait_all()
        # A thread that still runs when the interpreter ends may take the process down with it.
        engine.lane.close()


def _methods(forced: str | None, ranks: collectives.Ranks, *, sharded: bool) -> tuple[str, ...]:
    """Those that the plan may use."""
    if forced is None:
        return tuple(method for method in ranks.methods if shards(method) == sharded)
    collectives.check_method(forced, ranks)
    if shards(forced) != sharded:
        raise ValueError(
            f"method {forced!r} shares out the optimizer's state: say shard_optimizer=True"
            if shards(forced)
            else f"method {forced!r} does not share out the optimizer's state: "
            "leave out shard_optimizer, or take method='shard'"
        )
    return (forced,)


def _notes(optimizer: Optimizer, shard_optimizer: bool, ranks: int) -> list[str]:
    name = type(optimizer).__name__
    if not update.is_elementwise(optimizer):
        return [f"{name} may look at whole parameters, so every rank updates all of them."]
    if shard_optimizer:
        return [f"Each rank keeps 1/{ranks} of the state of {name}."]
    return [f"shard_optimizer=True would leave each rank 1/{ranks} of the state of {name}."]


def _can_shard(optimizer: Optimizer, separable: bool | None) -> bool:
    if separable is False:
        raise ValueError(
            "shard_optimizer=True updates parts of parameters, which separable=False forbids: "
            "leave out one of them"
        )
    if update.is_elementwise(optimizer):
        return True
    warnings.warn(
        f"{type(optimizer).__name__} is not known to update each element by itself, so its state "
        "is not shared out: every rank keeps all of it",
        stacklevel=3,
    )
    return False


def _nothing(engine: Engine) -> None:
    pass


def _loaded(plan: Plan | str | Path | None) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        return plan
    try:
        return Plan.from_json(json.loads(Path(plan).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"cannot read plan {str(plan)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{str(plan)!r} holds no plan: {error}") from None


def _misfit(plan: Plan, layout: Layout, ranks: int) -> str | None:
    """The first thing in which a given plan differs from what is here."""
    here = {"ranks": ranks, "flats": [asdict(flat) for flat in layout.flats]}
    theirs = {"ranks": plan.ranks, "flats": [asdict(flat) for flat in plan.flats]}
    return first_difference(theirs, here)


def _others(model: nn.Module, layout: Layout) -> list[Tensor]:
    """Frozen parameters and buffers: all that is not in the flat buffers."""
    inside = {id(member.parameter) for member in layout.members}
    return [
        tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in inside
    ]
