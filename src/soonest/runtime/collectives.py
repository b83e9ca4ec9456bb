"""What goes over the network; the only file that names torch's collectives."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

Group = dist.ProcessGroup
Work = dist.Work


def private_group(parent: Group | None, timeout_s: float | None) -> Group:
    """A communicator of our own over the ranks of ``parent``, so that no other traffic mixes in.

    Args:
        parent: None stands for the default group.
        timeout_s: of every collective; None keeps torch's default.
    """
    parent = parent if parent is not None else dist.group.WORLD
    timeout = None if timeout_s is None else datetime.timedelta(seconds=timeout_s)
    group = dist.new_group(
        dist.get_process_group_ranks(parent),
        timeout=timeout,
        backend=dist.get_backend(parent),
        group_desc="soonest",
    )
    assert isinstance(group, Group)
    return group


def timeout_of(group: Group) -> float:
    """Seconds after which the group's collectives give up."""
    backend = group._get_backend(torch.device("cpu"))
    options = getattr(backend, "options", None)
    timeout = getattr(options, "_timeout", None) or dist.default_pg_timeout
    return timeout.total_seconds()


def all_reduce(group: Group, tensor: Tensor) -> Work:
    """Starts summing a contiguous tensor over the ranks, in place."""
    return group.allreduce([tensor])


_STARTERS: dict[str, Callable[[Group, Tensor], Work]] = {"all_reduce": all_reduce}


def start(kind: str, group: Group, tensor: Tensor) -> Work:
    """Starts one op of a plan on its bucket's slice of the gradient buffer."""
    return _STARTERS[kind](group, tensor)


def broadcast(group: Group, tensors: Sequence[Tensor]) -> None:
    """Overwrites tensors by those of the group's first rank."""
    alike: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(tensor.dtype, []).append(tensor.detach())
    for group_of_tensors in alike.values():
        for batch in _batches(group_of_tensors):
            joined = _flatten_dense_tensors(batch)
            group.broadcast(joined, 0).wait()
            for tensor, value in zip(batch, _unflatten_dense_tensors(joined, batch), strict=True):
                tensor.copy_(value)


def _batches(tensors: Sequence[Tensor], limit_bytes: int = 64 << 20) -> list[list[Tensor]]:
    """Consecutive tensors, so many that a batch does not need much extra memory."""
    batches: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.nbytes > room:
            batches.append([])
            room = limit_bytes
        batches[-1].append(tensor)
        room -= tensor.nbytes
    return batches


def gather_objects(group: Group, value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def first_rank_object(group: Group, value: Any) -> Any:
    """The value of the group's first rank."""
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def barrier(group: Group) -> None:
    group.barrier().wait()
