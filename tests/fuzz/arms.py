"""The ways to train over ranks that are compared: torch's own, and the forms of soonest."""

from __future__ import annotations

import gc
from contextlib import suppress
from random import Random
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import soonest
from fuzz.loops import Loop
from helpers.strategies import any_cut
from soonest.core.plan import METHODS, Plan, shards
from soonest.runtime.flat.buffers import flats_for, trainable
from soonest.runtime.optim import bucket_update

DDP = "DistributedDataParallel"
PRIORITIZE, DROP_IN, BOTH, SHARDED = "prioritize", "drop-in", "both", "sharded"
ARMS = (PRIORITIZE, DROP_IN, BOTH, SHARDED)
OWN_BUFFERS = "prioritize, broadcast_buffers=False"
"""Is not the same as DDP, and meant to be found."""
TIMEOUT_S = 60


class Arm:
    """One model trained over the ranks.

    Args:
        name: of the way.
        loop: says with which settings.

    Attributes:
        net: what to call.
        handle: of soonest, where there is one.
    """

    def __init__(self, name: str, loop: Loop) -> None:
        self.name = name
        self._loop = loop
        self._groups = set(dist.distributed_c10d._world.pg_map)
        self.handle: soonest.Handle | None = None
        self.net: Any = None

    @property
    def is_ddp(self) -> bool:
        return self.name == DDP

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Trains over the ranks from now on."""
        if self.name in (PRIORITIZE, SHARDED, OWN_BUFFERS):
            self.net = model
            self.handle = soonest.prioritize(
                model, optimizer, timeout_s=TIMEOUT_S, **self._options(model, optimizer)
            )
            return
        ddp: dict[str, Any] = {
            "find_unused_parameters": self._loop.finds_unused,
            "bucket_cap_mb": self._loop.setting("bucket_mb"),
        }
        if self.is_ddp:
            self.net = DistributedDataParallel(model, **ddp)
            return
        self.net = soonest.DistributedDataParallel(model, **ddp)
        if self.name == BOTH:
            options = self._options(model, optimizer)
            if ddp["bucket_cap_mb"] is not None:
                options = {key: options[key] for key in options if key == "separable"}
            self.handle = self.net.prioritize(optimizer, **options)

    def wrap_anew(self, model: nn.Module, optimizer: Optimizer) -> None:
        """After other parameters have come to be trained; ``prioritize`` sees that by itself."""
        if self.name not in (PRIORITIZE, SHARDED, OWN_BUFFERS):
            self.wrap(model, optimizer)

    def exchange(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Goes on with another optimizer."""
        if self.name in (PRIORITIZE, SHARDED, OWN_BUFFERS):
            assert self.handle is not None
            self.handle.detach()
            buffers = [b.clone() for b in model.buffers()]
            self.wrap(model, optimizer)
            for b, kept in zip(model.buffers(), buffers, strict=True):
                b.copy_(kept)  # DDP, which is not made anew, sends its own later
        elif self.name == BOTH:
            self.handle = self.net.prioritize(optimizer)

    def no_sync(self) -> Any:
        return (
            self.handle.no_sync()
            if self.name in (PRIORITIZE, SHARDED, OWN_BUFFERS)
            else self.net.no_sync()
        )

    def _options(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        found: dict[str, Any] = {}
        sharded = self.name == SHARDED
        separable = self._loop.setting("separable")
        if separable is True and bucket_update.is_separable(optimizer):
            found["separable"] = True
        if separable is False and not sharded:
            found["separable"] = False
        if self.name == OWN_BUFFERS:
            found["broadcast_buffers"] = False
        if sharded:
            found["shard_optimizer"] = True
        if self._loop.setting("plan") == "given":
            can = not sharded or bucket_update.is_elementwise(optimizer)
            methods = [m for m in METHODS if shards(m) == (sharded and can) and m != "hierarchical"]
            flats = flats_for(trainable(model))
            buckets, ops = any_cut(Random(self._loop.seed), flats, methods)
            found["plan"] = Plan(dist.get_world_size(), flats, buckets, ops, 2)
        elif self._loop.setting("method") and not sharded:
            found["method"] = self._loop.setting("method")
        return found

    def end(self) -> None:
        """Leaves nothing of it behind."""
        handle, self.handle = self.handle, None
        if handle is not None:
            with suppress(soonest.SoonestError):
                handle.detach()
        self.net = handle = None
        gc.collect()
        for group in set(dist.distributed_c10d._world.pg_map) - self._groups:
            dist.destroy_process_group(group)
