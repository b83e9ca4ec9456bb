"""The ways of training that are compared, all on the same replayed module."""

from __future__ import annotations

import importlib
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import soonest
from soonest.bench import peers
from soonest.bench.observe import DdpObserver
from soonest.bench.settings import MOMENTUM, VARIANTS, Settings
from soonest.core.timeline import Timeline
from soonest.lab.replay import Replay


def _nothing() -> None:
    pass


@dataclass
class Arm:
    """One way of training.

    Args:
        replay: what is trained.
        forward: does a forward pass; returns the loss.
        update: does the rest of a step with it: backward pass, communication, update.
        flush: waits until nothing is in flight.
        ready: whether steps stay alike from now on.
        settle: makes the parameters whole on this rank, so that they can be verified.
        timeline: of the last complete step, if the arm measures it.
        observe: makes the arm measure it; steps may take longer from then on.
        detach: undoes it.
        note: what is to be told about it with the figures, complete once it is detached.
    """

    replay: Replay
    forward: Callable[[], Tensor]
    update: Callable[[Tensor], None]
    flush: Callable[[], None] = _nothing
    ready: Callable[[], bool] = lambda: True
    settle: Callable[[], None] = _nothing
    timeline: Callable[[], Timeline | None] = lambda: None
    observe: Callable[[], None] = _nothing
    detach: Callable[[], None] = _nothing
    note: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(
        cls, replay: Replay, model: Callable[[Tensor], Tensor], optimizer: Any, **options: Any
    ) -> Arm:
        """One that is trained by the usual loop."""
        x = torch.zeros(1)

        def update(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return cls(replay, lambda: model(x), update, **options)


Time = Callable[[Arm, str], list[float]]
"""Trains an arm with this bucket size a little; the seconds of its steps, same on every rank."""


def replayed(settings: Settings, *, alone: bool = False, rounding: float = 0.0) -> Replay:
    """The module that all arms train; a new one each time."""
    return Replay(
        settings.trace,
        settings.slow_motion,
        settings.shrink,
        momentum=MOMENTUM,
        alone=alone,
        check=True,
        rounding=rounding,
        overhead_s=settings.overhead_s,
    )


def local(settings: Settings, time: Time) -> Arm:
    """Every rank by itself: what a step takes that sends nothing."""
    replay = replayed(settings, alone=True)
    return Arm.of(replay, replay, replay.sgd())


def sequential(settings: Settings, time: Time) -> Arm:
    """As the conventional software of 2016: one all-reduce per layer, after the backward pass."""
    replay = replayed(settings)
    optimizer = replay.sgd()
    parameters = list(replay.parameters())[::-1]
    x = torch.zeros(1)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        for parameter in parameters:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad.div_(replay.ranks))
        optimizer.step()

    return Arm(replay, lambda: replay(x), update)


def ddp(settings: Settings, time: Time) -> Arm:
    """``DistributedDataParallel`` with its own bucket size."""
    return _ddp(settings, *settings.sweep()["default"])


def ddp_tuned(settings: Settings, time: Time) -> Arm:
    """``DistributedDataParallel`` with the bucket size that is fastest here, of those tried."""
    sweep_ms = {
        name: statistics.median(time(_ddp(settings, *caps), name)) * 1e3 / settings.slow_motion
        for name, caps in settings.sweep().items()
    }
    best = min(sweep_ms, key=sweep_ms.__getitem__)
    arm = _ddp(settings, *settings.sweep()[best])
    arm.note |= {"bucket": best, "sweep_ms": sweep_ms}
    return arm


def _ddp(settings: Settings, *caps_mb: float) -> Arm:
    replay = replayed(settings)
    optimizer = replay.sgd()
    wrapped = peers.ddp(replay, [cap / settings.shrink for cap in caps_mb])
    arm = Arm.of(replay, wrapped, optimizer)

    def observe() -> None:
        arm.timeline = DdpObserver(wrapped, optimizer).timeline

    arm.observe = observe
    return arm


def ddp_zero1(settings: Settings, time: Time) -> Arm:
    """``DistributedDataParallel`` with ``ZeroRedundancyOptimizer``."""
    replay = replayed(settings)
    wrapped = peers.ddp(replay, [cap / settings.shrink for cap in settings.sweep()["default"]])
    return Arm.of(replay, wrapped, peers.zero_redundancy(replay))


def fsdp2(settings: Settings, time: Time) -> Arm:
    """``fully_shard`` on every layer."""
    replay = replayed(settings)
    unshard = peers.shard_fully(replay)
    optimizer = replay.sgd(fused=False)  # which sharded tensors do not have
    return Arm.of(replay, replay, optimizer, settle=unshard)


def deepspeed_zero1(settings: Settings, time: Time) -> Arm:
    """DeepSpeed as its first stage works: sharded state, gradients by bucket."""
    replay = replayed(settings)
    engine = peers.DeepSpeed(replay, settings.shrink)
    return Arm(replay, engine.forward, engine.update, detach=engine.close)


def horovod(settings: Settings, time: Time) -> Arm:
    """Horovod as it works: tensors fused as they come, in cycles."""
    replay = replayed(settings)
    peer = peers.Horovod(replay, settings.slow_motion, settings.shrink)
    return Arm.of(replay, replay, peer.optimizer, detach=peer.close)


def prioritized(settings: Settings, time: Time) -> Arm:
    """``soonest.prioritize``, by one method if the settings say which."""
    options = VARIANTS[f"soonest-{settings.method}"] if settings.method else {}
    return _prioritized(settings, time, **options)


def _prioritized(
    settings: Settings, time: Time, *, wire_dtype: str | None = None, **options: Any
) -> Arm:
    rounding = 0.0
    if wire_dtype:
        options["wire_dtype"] = dtype = getattr(torch, wire_dtype)
        rounding = torch.finfo(dtype).eps / 2
    replay = replayed(settings, rounding=rounding)
    optimizer = replay.sgd()
    handle = soonest.prioritize(replay, optimizer, **options)

    def detach() -> None:
        if handle.plan and handle.network:  # the plan may have changed until now, and goes now
            arm.note["methods"] = dict(Counter(bucket.method for bucket in handle.plan.buckets))
            arm.note["network"] = handle.network.to_json()
        handle.detach()

    arm = Arm.of(
        replay,
        replay,
        optimizer,
        flush=handle.flush,
        ready=lambda: handle.settled,
        timeline=handle.timeline,
        detach=detach,
    )
    return arm


Maker = Callable[[Settings, Time], Arm]
MAKERS: dict[str, Maker] = {
    "local": local,
    "sequential": sequential,
    "ddp": ddp,
    "ddp-tuned": ddp_tuned,
    "ddp-zero1": ddp_zero1,
    "fsdp2": fsdp2,
    "deepspeed-zero1": deepspeed_zero1,
    "horovod": horovod,
    "soonest": prioritized,
    **{arm: partial(_prioritized, **options) for arm, options in VARIANTS.items()},
}
"""By the names of ``settings.KNOWN``."""


def maker(name: str) -> Maker:
    """How to make an arm."""
    if ":" not in name:
        return MAKERS[name]
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)
