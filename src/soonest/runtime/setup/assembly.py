"""How training by priority begins: check, connect, plan, assemble."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.planner.planner import first_plan
from soonest.errors import SoonestError
from soonest.runtime import agreement, comm
from soonest.runtime.comm import groups, rendezvous
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.engine import consistency
from soonest.runtime.engine.engine import Engine
from soonest.runtime.engine.module_buffers import Buffers
from soonest.runtime.engine.new_params import Newcomers, admit
from soonest.runtime.engine.one_rank import Alone
from soonest.runtime.execute.choose_lane import check_group, lane_for
from soonest.runtime.execute.lane import Lane
from soonest.runtime.flat.buffers import FlatBuffers, trainable
from soonest.runtime.guard.hooks import noop
from soonest.runtime.handle import Handle
from soonest.runtime.optim import bucket_update
from soonest.runtime.options import Options
from soonest.runtime.setup.request import AfterStep, Request, TrainingPart, check_request
from soonest.runtime.timing.lateness import Lateness
from soonest.runtime.tuning import calibrate, plan_file
from soonest.runtime.tuning.autotuner import AutoTuner
from soonest.runtime.tuning.plan_sources import (
    PlanSources,
    can_shard,
    methods_for,
    note_on,
    warn_of_replaced_step,
)
from soonest.runtime.validate.checks import check_parts

_log = logging.getLogger(__name__)
UNKNOWN = Network.linear(0.0, 1e9)
"""Stands for the network where it chooses nothing."""
WINDOW = 2
"""Ops in flight: the second hides the latency of the first; more would only blur the order."""


@dataclass(frozen=True, kw_only=True)
class _Connection:
    """The ranks, which have agreed on what they were asked for."""

    device: torch.device
    group: comm.Group
    ranks: comm.Ranks
    failures: FailureReporter


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A plan to begin with, and what it was made from."""

    layout: FlatBuffers
    plan: Plan
    sharded: bool
    sources: PlanSources
    lane: Lane
    comparing: comm.Group | None


def build(
    model: nn.Module, optimizer: Optimizer, options: Options, part: TrainingPart | None = None
) -> Handle:
    """What ``prioritize`` does for one optimizer; a collective call.

    Args:
        model, optimizer, options: see ``prioritize``.
        part: of the training; all of it if None.
    """
    request = check_request(model, optimizer, options, part or TrainingPart())
    if request.group.size() == 1 and request.part.lane is None:
        if request.refused:
            raise request.refused
        alone = None if request.part.equal else Alone(model, request.part.without)
        return Handle(model, request.optimizer, request.group, alone=alone)
    connection = _connect(request)
    with ExitStack() as undo:
        planned = _plan(request, connection, undo)
        return _assemble(request, connection, planned, undo)


# Connect


def _connect(request: Request) -> _Connection:
    """Meets the other ranks, and agrees with them on all that they were given."""
    model, part = request.model, request.part
    device = torch.device("cpu")
    if not request.refused:
        device = next(p.device for _, _, p in trainable(model, part.without))
        check_group(request.group, device)
    group = rendezvous.connect(request.group, request.options.timeout_s)
    failures = FailureReporter(group)
    with failures.together("prioritize()"):
        agreement.agree_on_input(group, request.refused)
        agreement.agree_on_options(group, request.asked)
        agreement.agree_on_model(group, model, part.without)
        if not part.equal:
            agreement.agree_on_the_rest(group, model)
        agreement.agree_on_groups(group, model, request.optimizer, part.without)
        if request.plan is not None:
            agreement.agree_on_plan(group, request.plan)
        ranks = groups.ranks_of(group, native=device.type != "cpu")
    return _Connection(device=device, group=group, ranks=ranks, failures=failures)


# Plan


def _plan(request: Request, connection: _Connection, undo: ExitStack) -> _Planned:
    """Gives all ranks the first one's values, measures the network, and makes the first plan.

    Args:
        request, connection: what to plan for.
        undo: is given what takes back the changes, should anything fail.
    """
    model, part, given = request.model, request.part, request.plan
    optimizer, options = request.optimizer, request.options
    group, ranks, failures = connection.group, connection.ranks, connection.failures
    note = note_on(optimizer, options.shard_optimizer, group.size())
    warn_of_replaced_step(optimizer)
    sharded = options.shard_optimizer and can_shard(optimizer, options.separable)
    if sharded:
        check_parts(model, part.without)
    methods = methods_for(options.method, given, ranks, sharded=sharded)
    order = [slot.name for flat in given.flats for slot in flat.slots] if given else []
    layout = FlatBuffers(model, order, without=part.without)
    undo.callback(layout.move_out)
    lane = part.lane or lane_for(group, connection.device, failures)
    undo.callback(lane.close)
    if given is not None:
        plan_file.check(given, layout, group.size())
    with failures.together("prioritize()"):
        if not part.equal:
            comm.broadcast(group, [*model.parameters(), *model.buffers()])
        network = UNKNOWN
        if part.lane is None:
            network = calibrate.network_of(
                ranks, methods=methods, device=connection.device, wire=options.wire
            )
        _log.debug("what reducing costs here: %s", network)
        plan = given or _agreed_plan(group, layout, network, methods)
        comparing = groups.private_group(group) if request.compare_every else None
    asked = f"method={options.method!r} was asked for" if options.method else None
    why = "as the given plan says" if given is not None else asked
    return _Planned(
        layout=layout,
        plan=plan,
        sharded=sharded,
        sources=PlanSources(network, methods, why, (note,)),
        lane=lane,
        comparing=comparing,
    )


def _agreed_plan(
    group: comm.Group, layout: FlatBuffers, network: Network, methods: Sequence[str]
) -> Plan:
    """The plan to begin with; a collective call."""
    plan = first_plan(layout.flats, network, ranks=group.size(), window=WINDOW, methods=methods)
    agreement.agree_on_plan(group, plan)
    return plan


# Assemble


def _assemble(
    request: Request, connection: _Connection, planned: _Planned, undo: ExitStack
) -> Handle:
    """Makes the engine, and what learns from its steps; a collective call.

    Args:
        request, connection, planned: what to assemble.
        undo: takes back what was done before, until there is an engine.
    """
    model, optimizer, part = request.model, request.optimizer, request.part
    options, given = request.options, request.plan
    group, ranks, failures = connection.group, connection.ranks, connection.failures
    network, methods, lane = planned.sources.network, planned.sources.methods, planned.lane
    sharded, without = planned.sharded, part.without
    separable = options.separable
    by_bucket = bucket_update.is_separable(optimizer) if separable is None else separable
    resumed = bool(optimizer.state)
    tuner = AutoTuner(
        network,
        window=WINDOW,
        methods=methods,
        ranks=group.size(),
        job={
            "optimizer": type(optimizer).__name__,
            "separable": by_bucket,
            "wire": [str(options.wire.gradients), str(options.wire.parameters)],
        },
    )
    tuner.start_with(planned.layout)

    def anew(engine: Engine, parameters: Sequence[nn.Parameter]) -> None:
        if sharded:  # not ``planned`` or ``part``: what they refer to would live as long as this
            check_parts(model, without)
        with failures.together("taking in parameters"):
            agreement.agree_on_model(ranks.talk, model, without)
            if parameters:
                admit(ranks, parameters)
            grown = engine.layout.grown()
            engine.bind(grown, _agreed_plan(ranks.talk, grown, network, methods))
            tuner.start_over(engine, selected=given is not None)

    with failures.together("prioritize()"):
        buffers = Buffers(
            model, lambda: groups.private_group(group, options.timeout_s), lane, failures
        )
    engine = Engine(
        model,
        optimizer,
        separable=by_bucket,
        layout=planned.layout,
        plan=planned.plan,
        ranks=ranks,
        lane=lane,
        sharing=comm.Ranks(ranks.second, ranks.second) if sharded else None,
        wire=options.wire,
        failures=failures,
        after_step=_after_step(request, connection, planned, tuner),
        buffers=buffers if options.broadcast_buffers else None,
        newcomers=(
            None if part.equal else Newcomers(model, part.without, part.ours or (lambda _: True))
        ),
        anew=anew,
    )
    undo.pop_all()
    engine.settled = given is not None
    with failures.together("prioritize()"):
        tuner.resume(engine, resumed=resumed)
        watching = groups.private_group(group) if part.lane is None and lane.clock is None else None
        failures.learn_connections()
    if watching is not None:
        engine.backward.lateness = Lateness(watching, failures, engine.history)
    if group.rank() == 0:
        _log.info("%s", _begun(request, planned))
    return Handle(model, optimizer, request.group, engine, planned.sources, tuner)


def _begun(request: Request, planned: _Planned) -> str:
    """What is trained, and by which plan at first, in a sentence."""
    plan, params = planned.plan, planned.layout.params
    size_bytes = sum(plan.bucket_bytes(index) for index in range(len(plan.buckets)))
    methods = ", ".join(dict.fromkeys(bucket.method for bucket in plan.buckets))
    given = ", as given" if request.plan is not None else ""
    sharded = ", each rank with its part of the optimizer's state" if planned.sharded else ""
    return (
        f"{type(request.model).__name__} and {type(request.optimizer).__name__} on {plan.ranks} "
        f"ranks{sharded}: {len(params)} parameters, {size_bytes / 1e6:.1f} MB of gradients, in "
        f"{len(plan.buckets)} buckets by {methods}{given}"
    )


def _after_step(
    request: Request, connection: _Connection, planned: _Planned, tuner: AutoTuner
) -> AfterStep:
    """What is to be done at the end of each step, on all ranks together."""
    after_step: AfterStep = tuner if request.plan is None else noop
    if planned.comparing is not None:
        after_step = consistency.Comparison(planned.comparing, request.compare_every, after_step)
    if after_step is noop:
        return noop
    together = _together(connection.failures, after_step)
    return request.part.turns(together) if request.part.turns else together


def _together(failures: FailureReporter, after_step: AfterStep) -> AfterStep:
    """Wraps what follows a step: names the missing rank if one does not take part."""

    def call(engine: Engine) -> None:
        step = engine.backward.passes - 1
        what = f"what follows step {step}, as planning or {consistency.VARIABLE},"
        try:
            with failures.together(what):
                after_step(engine)
        except SoonestError as error:
            if error.__cause__ is not None:  # the backend has failed
                engine.lane.fail(error)
            raise

    return call
