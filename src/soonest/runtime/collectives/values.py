"""Small things that the ranks tell each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from soonest.runtime.collectives.ranks import Group


def sum_small(group: Group, tensor: Tensor) -> None:
    """Sums a small tensor over the ranks, in place, and waits for it; a collective call."""
    sent = sendable(group, tensor)
    group.allreduce([sent]).wait()
    if sent is not tensor:
        tensor.copy_(sent)


def gather_objects(group: Group, value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_numbers(group: Group, value: float) -> list[float]:
    """Every rank's value, by rank; cheaper than ``gather_objects``."""
    mine = sendable(group, torch.tensor(value, dtype=torch.float64))
    return gather_scalars(group, mine).tolist()


def gather_scalars(group: Group, value: Tensor) -> Tensor:
    """Every rank's number, in the order of ranks; on a device the host does not wait for it."""
    every = value.new_empty(group.size())
    group.all_gather_single(every, value.view(1)).wait()
    return every


def first_rank_object(group: Group, value: Any) -> Any:
    """The value of the group's first rank."""
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def last_of(group: Group, *, mine: bool) -> int:
    """The last rank for which something is so; a collective call.

    Args:
        group: all ranks.
        mine: for this one it is.
    """
    return round(max(gather_numbers(group, group.rank() if mine else -1)))


def sendable(group: Group, tensor: Tensor) -> Tensor:
    """A tensor, or a copy of it on a device that the group's backend sends from."""
    if any(device.type == tensor.device.type for device in group._device_types):
        return tensor
    return tensor.to(dist.distributed_c10d._get_object_coll_device(group))
