"""The one added line, and what it returns."""

from __future__ import annotations

import atexit
import json
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.core.plan import Plan, first_difference, shards
from soonest.core.planner import first_plan
from soonest.core.timeline import Timeline
from soonest.runtime import agree, calibrate, collectives, update
from soonest.runtime.checks import check
from soonest.runtime.engine import Engine
from soonest.runtime.lanes import ThreadLane
from soonest.runtime.layout import Layout
from soonest.runtime.learn import Learner
from soonest.runtime.peers import Peers

WINDOW = 2
"""Ops in flight: the second hides the latency of the first; more would only blur the order."""


class Handle:
    """A prioritized model and optimizer; ``prioritize`` makes it.

    It need not be kept: training goes on without it.
    """

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine

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

    def detach(self) -> None:
        """Makes model and optimizer plain objects again, with all updates applied.

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

    Returns:
        A handle; it need not be kept.

    Raises:
        ValueError: the model or the optimizer is not fit for this; the message says what to do.
        PlanMismatchError: the ranks have different models or plans.
    """
    check(model, optimizer)
    given = _loaded(plan)
    parent = process_group if process_group is not None else dist.group.WORLD
    assert parent is not None
    if parent.size() == 1:
        return Handle(None)
    group = collectives.private_group(parent, timeout_s)
    ranks = collectives.ranks_of(group)
    peers = Peers(group)
    order = [slot.name for flat in given.flats for slot in flat.slots] if given else []
    agree.agree_on_model(group, model)
    layout = Layout(model, order)
    lane = ThreadLane(timeout_s=collectives.timeout_of(group), blame=peers.blame)
    try:
        if given is not None and (wrong := _misfit(given, layout, group.size())):
            raise ValueError(f"the plan is not for this model and group: {wrong} (plan / here)")
        collectives.broadcast(group, [*layout.parameters, *_others(model, layout)])
        methods = _methods(method, ranks)
        network = calibrate.network_of(
            ranks, methods=methods, device=layout.parameters[0].device, wire=None
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
            after_step=learner if given is None else _nothing,
        )
    except BaseException:
        lane.close()
        layout.move_out()
        raise
    engine.settled = given is not None
    _engines.add(engine)
    weakref.finalize(engine, lane.close).atexit = False  # at exit, what is in flight goes first
    return Handle(engine)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _finish() -> None:
    """A script that ends still owes the other ranks its part of what is in flight."""
    for engine in list(_engines):
        if engine.lane.error is None:
            engine.lane.wait_all()
        # A thread that still runs when the interpreter ends may take the process down with it.
        engine.lane.close()


def _methods(forced: str | None, ranks: collectives.Ranks) -> tuple[str, ...]:
    """Those that the plan may use."""
    if forced is None:
        return tuple(method for method in ranks.methods if not shards(method))
    collectives.check_method(forced, ranks)
    return (forced,)


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
