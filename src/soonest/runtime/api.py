"""The one added line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from soonest.core.plan import Plan
from soonest.runtime.flat.buffers import trainable
from soonest.runtime.handle import Handle
from soonest.runtime.optim.patch import optimizer_in
from soonest.runtime.options import Keywords, Options
from soonest.runtime.setup import TrainingPart, build
from soonest.runtime.validate.checks import check_several


@overload
def prioritize(model: nn.Module, optimizer: Optimizer, **options: Unpack[Keywords]) -> Handle: ...


@overload
def prioritize(
    model: nn.Module, optimizer: Sequence[Optimizer], **options: Unpack[Keywords]
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
    observes the model; from then on gradients are reduced, parameters updated and forward passes
    run overlapped, by a plan that is the same on every rank. Some plans take turns, among them one
    that does as ``DistributedDataParallel``, and the fastest stays. Every rank must call this, at
    the same point.

    Args:
        model: on CPU, or on one CUDA device; its trainable parameters, of any floating or complex
            dtype, stay in their memory, and their gradients lie in flat buffers. Several models
            that one optimizer trains are given as an ``nn.ModuleList`` of them.
        optimizer: holds parameters of ``model`` only. Trainable parameters that it does not hold
            are reduced but not updated. Several that train parts of one model are given together;
            each backward pass then reduces all gradients, and each step updates its part.
        process_group: over which to reduce; the default group if None.
        timeout_s: how long a collective may take, seconds; as long as in ``process_group`` if
            None, so what ``init_process_group(timeout=...)`` says.
        plan: a plan, or the path of one that ``handle.save_plan`` saved, to use from the first step
            to the last instead of making one.
        separable: whether the optimizer updates each parameter by itself, looking at nothing but
            that parameter, its gradient, its state and its group's settings. None means: yes for
            the optimizers of ``torch.optim`` that do, no for any other class. Where it is not, all
            parameters are updated together inside ``optimizer.step()``, and only the backward pass
            is overlapped.
        method: reduce every bucket so, a key of ``soonest.METHODS``, instead of choosing the
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
            statistics, at the moments at which ``DistributedDataParallel`` does: before a forward
            pass, if the one before was to be reduced.

    Returns:
        A handle; it need not be kept. For several optimizers one each.

    Raises:
        ValueError: the model, the optimizer or the plan is not fit for this; the message says what
            to do.
        PlanMismatchError: the ranks have different models or plans, or ask for different things.
    """
    options = Options(
        process_group=process_group,
        timeout_s=timeout_s,
        plan=plan,
        separable=separable,
        method=method,
        shard_optimizer=shard_optimizer,
        wire_dtype=wire_dtype,
        parameter_wire_dtype=parameter_wire_dtype,
        broadcast_buffers=broadcast_buffers,
    )
    if not isinstance(optimizer, list | tuple):
        return build(model, optimizer, options)  # type: ignore[arg-type]
    return _build_several(model, optimizer, options)


def _build_several(
    model: nn.Module, optimizers: Sequence[Optimizer], options: Options
) -> tuple[Handle, ...]:
    """An engine for the parameters of each; those of none are the first one's."""
    optimizers = [optimizer_in(one) for one in optimizers]
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
            part = TrainingPart(
                name=f"number {index + 1} of {len(optimizers)}",
                without=[n for n, _, p in named if index_of(p) != index],
                ours=lambda parameter, mine=index: index_of(parameter) == mine,
            )
            buffers = options.broadcast_buffers and not index  # once for the model
            handles.append(
                build(model, optimizer, replace(options, broadcast_buffers=buffers), part)
            )
    except BaseException:
        for handle in handles:
            handle.detach()
        raise
    together = [handle.engine.backward for handle in handles if handle.engine]
    for backward in together:
        backward.siblings = [other for other in together if other is not backward]
    return tuple(handles)
