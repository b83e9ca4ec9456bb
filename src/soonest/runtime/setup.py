"""How training by priority begins: what the ranks agree on, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.planner.planner import first_plan
from soonest.errors import SoonestError
from soonest.runtime import agreement, comm
from soonest.runtime.comm import groups
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.comm.joining import private_group
from soonest.runtime.engine import consistency
from soonest.runtime.engine.engine import Engine
from soonest.runtime.engine.module_buffers import Buffers
from soonest.runtime.engine.new_params import Newcomers, admit
from soonest.runtime.engine.one_rank import Alone
from soonest.runtime.execute.choose_lane import check_group, lane_for
from soonest.runtime.execute.lane import Lane
from soonest.runtime.flat.buffers import FlatBuffers, trainable
from soonest.runtime.guard.hooks import noop
from soonest.runtime.handle import Handle, is_shared
from soonest.runtime.optim import bucket_update
from soonest.runtime.optim.patch import optimizer_in
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
from soonest.runtime.validate import wrappers
from soonest.runtime.validate.checks import check, check_options, check_parts

UNKNOWN = Network.linear(0.0, 1e9)
"""Stands for the network where it chooses nothing."""
AfterStep = Callable[[Engine], None]
WINDOW = 2
"""Ops in flight: the second hides the latency of the first; more would only blur the order."""


def start(
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
    broadcast_buffers: bool = False,
    without: Collection[str] = (),
    ours: Callable[[nn.Parameter], bool] | None = None,
    part: str = "the only one",
    equal: bool = False,
    own_lane: Lane | None = None,
    turns: Callable[[AfterStep], AfterStep] | None = None,
) -> Handle:
    """What ``prioritize`` does, for those who also choose how it is done.

    Args:
        model, optimizer: and all up to ``broadcast_buffers``: see ``prioritize``.
        without: names of parameters to leave alone.
        ours: whether a parameter that comes to be trained later is combined, too; all are if None.
        part: which of the model's optimizers this is.
        equal: all ranks' models are equal by now, and what they train stays the same.
        own_lane: executes the plan, which must be given, in a group of any size.
        turns: given what learns from a step and compares ranks, says what to do at the end of each.
    """
    refused: ValueError | TypeError | None = None
    try:
        optimizer = optimizer_in(optimizer)
    except TypeError as error:
        refused = error
    refused = refused or _refusal(model, optimizer, without, outside=not equal)
    if not (dist.is_available() and dist.is_initialized()):
        assert refused
        raise refused
    wire = comm.Wire(wire_dtype, parameter_wire_dtype)
    given, every = None, 0
    try:
        check_options(method, wire, shard_optimizer=shard_optimizer)
        every = consistency.interval()
        given = plan_file.load(plan)
    except ValueError as error:
        refused = refused or error
    parent = process_group if process_group is not None else dist.group.WORLD
    assert parent is not None
    if parent.size() == 1 and own_lane is None:
        if refused:
            raise refused
        return Handle(model, optimizer, parent, alone=None if equal else Alone(model, without))
    device = torch.device("cpu")
    if not refused:
        device = next(p.device for _, _, p in trainable(model, without))
        check_group(parent, device)
    group = private_group(parent, timeout_s)
    failures = FailureReporter(group)
    options = {
        "the optimizer": f"{type(optimizer).__name__} ({part})",
        "plan": "given" if given else None,
        "separable": separable,
        "method": method,
        "shard_optimizer": shard_optimizer,
        "wire_dtype": wire_dtype,
        "parameter_wire_dtype": parameter_wire_dtype,
        "broadcast_buffers": broadcast_buffers,
        consistency.VARIABLE: every,
    }
    with failures.together("prioritize()"):
        agreement.agree_on_input(group, refused)
        agreement.agree_on_options(group, options)
        agreement.agree_on_model(group, model, without)
        if not equal:
            agreement.agree_on_the_rest(group, model)
        agreement.agree_on_groups(group, model, optimizer, without)
        if given is not None:
            agreement.agree_on_plan(group, given)
        ranks = groups.ranks_of(group, native=device.type != "cpu")
    note = note_on(optimizer, shard_optimizer, group.size())
    warn_of_replaced_step(optimizer)
    sharded = shard_optimizer and can_shard(optimizer, separable)
    if sharded:
        check_parts(model, without)
    methods = methods_for(method, given, ranks, sharded=sharded)
    sharing = comm.Ranks(ranks.second, ranks.second) if sharded else None
    order = [slot.name for flat in given.flats for slot in flat.slots] if given else []
    layout = FlatBuffers(model, order, without=without)
    lane = own_lane or lane_for(group, device, failures)
    try:
        if given is not None:
            plan_file.check(given, layout, group.size())
        with failures.together("prioritize()"):
            if not equal:
                comm.broadcast(group, [*model.parameters(), *model.buffers()])
            network = UNKNOWN
            if own_lane is None:
                network = calibrate.network_of(ranks, methods=methods, device=device, wire=wire)
            first = given or _agreed_plan(group, layout, network, methods)
            comparing = groups.again(group) if every else None
        by_bucket = bucket_update.is_separable(optimizer) if separable is None else separable
        job = {
            "optimizer": type(optimizer).__name__,
            "separable": by_bucket,
            "wire": [str(wire.gradients), str(wire.parameters)],
        }
        resumed = bool(optimizer.state)
        learner = AutoTuner(network, window=WINDOW, methods=methods, ranks=group.size(), job=job)
        learner.start_with(layout)
        after_step: AfterStep = learner if given is None else noop
        if comparing is not None:
            after_step = consistency.Comparison(comparing, every, after_step)
        if after_step is not noop:
            after_step = _together(failures, after_step)
            after_step = turns(after_step) if turns else after_step

        def anew(engine: Engine, parameters: Sequence[nn.Parameter]) -> None:
            if sharded:
                check_parts(model, without)
            with failures.together("taking in parameters"):
                agreement.agree_on_model(ranks.talk, model, without)
                if parameters:
                    admit(ranks, parameters)
                grown = engine.layout.grown()
                engine.bind(grown, _agreed_plan(ranks.talk, grown, network, methods))
                learner.start_over(engine, stays=given is not None)

        with failures.together("prioritize()"):
            buffers = Buffers(model, lambda: groups.private_group(group, timeout_s), lane, failures)
        engine = Engine(
            model,
            optimizer,
            separable=by_bucket,
            layout=layout,
            plan=first,
            ranks=ranks,
            lane=lane,
            sharing=sharing,
            wire=wire,
            failures=failures,
            after_step=after_step,
            buffers=buffers if broadcast_buffers else None,
            newcomers=None if equal else Newcomers(model, without, ours or (lambda _: True)),
            anew=anew,
        )
    except BaseException:
        lane.close()
        layout.move_out()
        raise
    engine.settled = given is not None
    with failures.together("prioritize()"):
        learner.resume(engine, resumed=resumed)
        watching = groups.again(group) if own_lane is None and lane.clock is None else None
        failures.learn_connections()
    if watching is not None:
        engine.backward.lateness = Lateness(watching, failures, engine.history)
    asked = f"method={method!r} was asked for" if method else None
    why = "as the given plan says" if given is not None else asked
    choice = PlanSources(network, methods, why, (note,))
    return Handle(model, optimizer, parent, engine, choice, learner)


def _agreed_plan(
    group: comm.Group, layout: FlatBuffers, network: Network, methods: Sequence[str]
) -> Plan:
    """The plan to begin with; a collective call."""
    plan = first_plan(layout.flats, network, ranks=group.size(), window=WINDOW, methods=methods)
    agreement.agree_on_plan(group, plan)
    return plan


def _together(failures: FailureReporter, after_step: AfterStep) -> AfterStep:
    """The same, which says who is at fault where a rank does not take part."""

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


def _refusal(
    model: nn.Module, optimizer: Optimizer, without: Collection[str], *, outside: bool
) -> ValueError | TypeError | None:
    """What is wrong with these two on this rank; the others have to be told.

    Args:
        model, optimizer, without: as for ``start``.
        outside: look for what else may share the model's gradients.
    """
    try:
        if isinstance(model, nn.Module) and is_shared(p for _, _, p in trainable(model, without)):
            raise ValueError(
                "this model is prioritized already: give prioritize all of its optimizers at once, "
                "as in prioritize(model, [first, second]), detach() the handle of the first call "
                "before, or call prioritize of the soonest.DistributedDataParallel that it is in"
            )
        check(model, optimizer, without)
        if outside:
            wrappers.check_outside(model)
    except (ValueError, TypeError) as error:
        return error
    return None
