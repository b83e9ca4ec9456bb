"""Other ways of training data-parallel, each as its own documentation says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from soonest.lab.replay import LR, Replay


def ddp(replay: Replay, caps_mb: Sequence[float]) -> DistributedDataParallel:
    """DDP without needless copies.

    Args:
        replay: what to wrap.
        caps_mb: sizes of the first bucket and of the following ones.
    """
    caps: Any = list(caps_mb)
    return DistributedDataParallel(replay, bucket_cap_mb_list=caps, gradient_as_bucket_view=True)


def zero_redundancy(replay: Replay) -> torch.optim.Optimizer:
    """An optimizer of which every rank has only a part of the state."""
    return ZeroRedundancyOptimizer(
        replay.parameters(),
        optimizer_class=torch.optim.SGD,
        parameters_as_bucket_view=True,
        lr=LR,
        momentum=replay.momentum,
    )


def shard_fully(replay: Replay) -> Callable[[], None]:
    """Shards every layer in place; returns what makes its parameters whole again."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers: list[Any] = [layer for layer in replay.layers if layer.weight is not None]
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(replay, mesh=mesh, reshard_after_forward=False)

    def unshard() -> None:
        for layer in layers:
            assert isinstance(layer, FSDPModule)
            layer.unshard()

    return unshard
