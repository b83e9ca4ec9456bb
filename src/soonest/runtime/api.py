"""The one added line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.core.network import Network
from soonest.core.plan import Plan, shards
from soonest.core.planner import first_plan
from soonest.errors import PeerLostError
from soonest.runtime import agree, calibrate, collectives, consistency, groups, pinned, update
from soonest.runtime.buffers import Buffers
from soonest.runtime.checks import check, check_options, check_several
from soonest.runtime.device import check_group, lane_for
from soonest.runtime.engine import Engine
from soonest.runtime.handle import Choice, Handle, is_shared
from soonest.runtime.lanes import Lane
from soonest.runtime.layout import Layout, trainable
from soonest.runtime.learn import Learner
from soonest.runtime.newcomers import Newcomers
from soonest.runtime.peers import Peers, private_group

UNKNOWN = Network.linear(0.0, 1e9)
"""Stands for the network where it chooses nothing."""
AfterStep = Callable[[Engine], None]
WINDOW = 2
"""Ops in flight: the second hides the latency of the first; more would only blur the order."""


class Options(TypedDict, total=False):
    """The further arguments of ``prioritize``."""

    process_group: dist.ProcessGroup | None
    timeout_s: float | None
    plan: Plan | str | Path | None
    separable: bool | None
    method: str | None
    shard_optimizer: bool
    wire_dtype: torch.dtype | None
    parameter_wire_dtype: torch.dtype | None
    broadcast_buffers: bool


@overload
def prioritize(model: nn.Module, optimizer: Optimizer, **options: Unpack[Options]) -> Handle: ...


@overload
def prioritize(
    model: nn.Module, optimizer: Sequence[Optimizer], **options: Unpack[Options]
) -> tuple[Handle, ...]: ...


def prioritize(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    process_group: dist.ProcessGroup | None = None,
    timeout_s: float | None = None,
    plan: Plan | str | Path | None = None,
    separable: bool | None = None,
    method: str | None = None,
    shard_optimizer: bool = False,
    wire_dtype: torch.dtype | None = None,
    parameter_wire_dtype: torch.dtype | None = None,
    broadcast_buffers: bool = True,
) -> Handle | tuple[Handle, ...]:
    """Trains ``model`` data-parallel, sending first what the next forward pass needs first.

    Model and optimizer stay the same objects and are changed in place; the training loop stays as
    it is. The parameters and buffers of the group's first rank are copied to all. The first step
    observes the model; from then on gradients are combined, parameters updated and forward passes
    run overlapped, by a plan that is the same on every rank. Some plans take turns, among them one
    that does as ``DistributedDataParallel``, and the fastest stays. Every rank must call this, at
    the same point.

    Args:
        model: on CPU, or on one CUDA device; its trainable parameters, of any floating or complex
            dtype, become views of flat buffers, when they come to be trained. Several models that
            one optimizer trains are given as an ``nn.ModuleList`` of them.
        optimizer: holds parameters of ``model`` only. Trainable parameters that it does not hold
            are combined but not updated. Several that train parts of one model are given together;
            each backward pass then combines all gradients, and each step updates its part.
        process_group: over which to combine; the default group if None.
        timeout_s: how long a collective may take, seconds; torch's own default if None (30
            minutes).
        plan: a plan, or the path of one that ``handle.save_plan`` saved, to use from the first step
            to the last instead of making one.
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
        broadcast_buffers: give every rank the first one's buffers, such as BatchNorm's running
            statistics, after each backward pass that is combined.

    Returns:
        A handle; it need not be kept. For several optimizers one each.

    Raises:
        ValueError: the model, the optimizer or the plan is not fit for this; the message says what
            to do.
        PlanMismatchError: the ranks have different models or plans, or ask for different things.
    """
    options = {
        "process_group": process_group,
        "timeout_s": timeout_s,
        "plan": plan,
        "separable": separable,
        "method": method,
        "shard_optimizer": shard_optimizer,
        "wire_dtype": wire_dtype,
        "parameter_wire_dtype": parameter_wire_dtype,
    }
    if not isinstance(optimizer, list | tuple):
        return start(model, optimizer, broadcast_buffers=broadcast_buffers, **options)  # type: ignore[arg-type]
    return _start_several(model, optimizer, broadcast_buffers, options)


def _start_several(
    model: nn.Module, optimizers: Sequence[Optimizer], broadcast_buffers: bool, options: Any
) -> tuple[Handle, ...]:
    """An engine for the parameters of each; those of none are the first one's."""
    check_several(model, optimizers)

    def index_of(parameter: nn.Parameter) -> int:
        held = (
            index
            for index, optimizer in enumerate(optimizers)
            if any(p is parameter for group in optimizer.param_groups for p in group["params"])
        )
        return next(held, 0)

    named = trainable(model)
    handles: list[Handle] = []
    try:
        for index, optimizer in enumerate(optimizers):
            handles.append(
                start(
                    model,
                    optimizer,
                    without=[n for n, _, p in named if index_of(p) != index],
                    ours=lambda parameter, mine=index: index_of(parameter) == mine,
                    part=f"number {index + 1} of {len(optimizers)}",
                    broadcast_buffers=broadcast_buffers and not index,
                    **options,
                )
            )
    except BaseException:
        for handle in handles:
            handle.detach()
        raise
    engines = [handle.engine for handle in handles if handle.engine]
    for engine in engines:
        engine.siblings = [other for other in engines if other is not engine]
    return tuple(handles)


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
    refused = _refusal(model, optimizer, without)
    if not (dist.is_available() and dist.is_initialized()):
        assert refused
        raise refused
    wire = collectives.Wire(wire_dtype, parameter_wire_dtype)
    given, every = None, 0
    try:
        check_options(method, wire, shard_optimizer=shard_optimizer)
        every = consistency.interval()
        given = pinned.load(plan)
    except ValueError as error:
        refused = refused or error
    parent = process_group if process_group is not None else dist.group.WORLD
    assert parent is not None
    if parent.size() == 1 and own_lane is None:
        if refused:
            raise refused
        return Handle(model, optimizer, parent)
    device = torch.device("cpu")
    if not refused:
        device = next(p.device for _, _, p in trainable(model, without))
        check_group(parent, device)
    group = private_group(parent, timeout_s)
    peers = Peers(group)
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
    with peers.together("prioritize()"):
        agree.agree_on_input(group, refused)
        agree.agree_on_options(group, options)
        agree.agree_on_model(group, model, without)
        if given is not None:
            agree.agree_on_plan(group, given)
        ranks = groups.ranks_of(group, native=device.type != "cpu")
    notes = _notes(optimizer, shard_optimizer, group.size())
    sharded = shard_optimizer and _can_shard(optimizer, separable)
    if sharded:
        _check_real(model, without)
    methods = _methods(method, given, ranks, sharded=sharded)
    sharing = collectives.Ranks(ranks.second, ranks.second) if sharded else None
    order = [slot.name for flat in given.flats for slot in flat.slots] if given else []
    layout = Layout(model, order, without=without)
    lane = own_lane or lane_for(group, device, peers)
    try:
        if given is not None and (wrong := pinned.misfit(given, layout, group.size())):
            raise ValueError(
                f"the plan is not for this model and group: {wrong}. Leave out plan=, or give one "
                "that was saved with this model on as many ranks"
            )
        with peers.together("prioritize()"):
            if not equal:
                collectives.broadcast(group, [*layout.parameters, *_others(model, layout)])
            network = (
                calibrate.network_of(ranks, methods=methods, device=device, wire=wire)
                if own_lane is None
                else UNKNOWN
            )
            first = given or first_plan(
                layout.flats, network, ranks=group.size(), window=WINDOW, methods=methods
            )
            if given is None:
                agree.agree_on_plan(group, first)
            comparing = groups.again(group) if every else None
        by_bucket = update.is_separable(optimizer) if separable is None else separable
        job = {
            "optimizer": type(optimizer).__name__,
            "separable": by_bucket,
            "wire": [str(wire.gradients), str(wire.parameters)],
        }
        resumed = bool(optimizer.state)
        learner = Learner(network, window=WINDOW, methods=methods, ranks=group.size(), job=job)
        learner.start_with(layout)
        after_step: AfterStep = learner if given is None else _nothing
        if comparing is not None:
            after_step = consistency.Comparison(comparing, every, after_step)
        if after_step is not _nothing:
            after_step = _together(peers, after_step)
        if turns and after_step is not _nothing:
            after_step = turns(after_step)

        def anew(engine: Engine, grown: Layout) -> None:
            if sharded:
                _check_real(model, without)
            with peers.together("taking in parameters"):
                agree.agree_on_model(group, model, without)
                plan = first_plan(
                    grown.flats, network, ranks=group.size(), window=WINDOW, methods=methods
                )
                agree.agree_on_plan(group, plan)
                engine.bind(grown, plan)
                learner.start_over(engine, stays=given is not None)

        with peers.together("prioritize()"):
            buffers = Buffers(model, lambda: groups.private_group(group, timeout_s), lane, peers)
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
            peers=peers,
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
    with peers.together("prioritize()"):
        learner.resume(engine, resumed=resumed)
    asked = f"method={method!r} was asked for" if method else None
    why = "as the given plan says" if given is not None else asked
    choice = Choice(network, methods, why, tuple(notes))
    return Handle(model, optimizer, parent, engine, choice, learner)


def _together(peers: Peers, after_step: AfterStep) -> AfterStep:
    """The same, which says who is at fault where a rank does not take part."""

    def call(engine: Engine) -> None:
        what = f"what follows step {engine.passes}, as planning or {consistency.VARIABLE},"
        try:
            with peers.together(what):
                after_step(engine)
        except PeerLostError as error:
            engine.lane.fail(error)
            raise

    return call


def _refusal(
    model: nn.Module, optimizer: Optimizer, without: Collection[str]
) -> ValueError | TypeError | None:
    """What is wrong with these two on this rank; the others have to be told."""
    try:
        if isinstance(model, nn.Module) and is_shared(p for _, _, p in trainable(model, without)):
            raise ValueError(
                "this model is prioritized already: give prioritize all of its optimizers at once, "
                "as in prioritize(model, [first, second]), detach() the handle of the first call "
                "before, or call prioritize of the soonest.DistributedDataParallel that it is in"
            )
        check(model, optimizer, without)
    except (ValueError, TypeError) as error:
        return error
    return None


def _methods(
    asked: str | None, given: Plan | None, ranks: collectives.Ranks, *, sharded: bool
) -> tuple[str, ...]:
    """Those that the plan may use, or does."""
    if given is not None:
        named = tuple(dict.fromkeys(bucket.method for bucket in given.buckets))
    elif asked is not None:
        named = (asked,)
    else:
        return tuple(method for method in ranks.methods if shards(method) == sharded)
    for method in named:
        collectives.check_method(method, ranks)
        if shards(method) != sharded:
            raise ValueError(
                f"method {method!r} shares out the optimizer's state: say shard_optimizer=True"
                if shards(method)
                else f"method {method!r} does not share out the optimizer's state: "
                "leave out shard_optimizer, or take method='shard'"
            )
    return named


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


def _check_real(model: nn.Module, without: Collection[str]) -> None:
    for name, _, parameter in trainable(model, without):
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, and states of complex parameters are "
                "not shared out over the ranks: leave out shard_optimizer=True"
            )


def _nothing(engine: Engine) -> None:
    pass


def _others(model: nn.Module, layout: Layout) -> list[Tensor]:
    """Frozen parameters and buffers: all that is not in the flat buffers."""
    inside = {id(member.parameter) for member in layout.members}
    return [
        tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in inside
    ]
