"""Small objects, numbers and sums that ranks exchange between steps."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from soonest.runtime.comm import unfinished
from soonest.runtime.comm.topology import Group
from soonest.runtime.comm.waiting import Work, finish


def sum_small(group: Group, tensor: Tensor) -> None:
    """Sums a small tensor over the ranks, in place, and waits for it; a collective call."""
    sent, work = start_sum(group, tensor)
    finish(work, on_device=not sent.is_cpu)
    if sent is not tensor:
        tensor.copy_(sent)


def start_sum(group: Group, tensor: Tensor) -> tuple[Tensor, Work]:
    """Begins to sum a small tensor over the ranks; a collective call.

    Returns:
        A tensor that holds the sums once the work has ended; on CPUs that is this one.
    """
    sent = sendable(group, tensor)
    return sent, unfinished.begun(group.allreduce([sent]))


def gather_objects(group: Group, value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    data = _pickled(value)
    sizes = [round(size) for size in gather_numbers(group, data.numel())]
    mine = torch.zeros(max(sizes), dtype=torch.uint8)
    mine[: data.numel()] = data
    sent = sendable(group, mine)
    every = sent.new_empty(group.size() * sent.numel())
    finish(group.all_gather_single(every, sent), on_device=not sent.is_cpu)
    parts = every.cpu().view(group.size(), -1)
    return [
        pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)
    ]


def _pickled(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def gather_numbers(group: Group, value: float) -> list[float]:
    """Every rank's value, by rank; cheaper than ``gather_objects``."""
    mine = sendable(group, torch.tensor(value, dtype=torch.float64))
    return gather_scalars(group, mine).tolist()


class Gathering:
    """Every rank's numbers on their way to every rank; to make this is a collective call.

    Args:
        group: all ranks; its backend has to send from the host.
        values: as many on every rank.
    """

    def __init__(self, group: Group, values: Sequence[float]) -> None:
        # Unseen by whatever modes the user's thread is in.
        with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
            mine = torch.from_numpy(np.array(values))
            self._every = torch.from_numpy(np.empty((group.size(), len(values))))
            work = group.all_gather_single(self._every.view(-1), mine)
        self._work = unfinished.begun(work)

    def result(self) -> list[list[float]] | None:
        """The numbers by rank, 64 bits each; None while they are under way.

        Raises:
            RuntimeError: a rank is lost.
        """
        if not self._work.is_completed():
            return None
        unfinished.over(self._work)
        self._work.wait()  # says why, if it failed
        return self._every.numpy().tolist()


def gather_scalars(group: Group, value: Tensor) -> Tensor:
    """Every rank's number, in the order of ranks; on a device the host does not wait for it."""
    every = value.new_empty(group.size())
    finish(group.all_gather_single(every, value.view(1)), on_device=not value.is_cpu)
    return every


def first_rank_object(group: Group, value: Any) -> Any:
    """The value of the group's first rank."""
    data = _pickled(value) if group.rank() == 0 else torch.empty(0, dtype=torch.uint8)
    size = round(gather_numbers(group, data.numel())[0])
    sent = sendable(group, data if group.rank() == 0 else data.new_empty(size))
    finish(group.broadcast(sent, 0), on_device=not sent.is_cpu)
    return value if group.rank() == 0 else pickle.loads(sent.cpu().numpy().tobytes())


def last_of(group: Group, *, mine: bool) -> int:
    """The last rank for which something is true; a collective call.

    Args:
        group: all ranks.
        mine: it is true for this rank.
    """
    return round(max(gather_numbers(group, group.rank() if mine else -1)))


def sendable(group: Group, tensor: Tensor) -> Tensor:
    """A tensor, or a copy of it on a device that the group's backend sends from."""
    if any(device.type == tensor.device.type for device in group._device_types):
        return tensor
    return tensor.to(dist.distributed_c10d._get_object_coll_device(group))
