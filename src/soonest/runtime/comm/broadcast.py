"""Sends tensors of one rank to all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from soonest.runtime.comm import unfinished
from soonest.runtime.comm.objects import last_of, sendable
from soonest.runtime.comm.topology import Group
from soonest.runtime.comm.waiting import Work, finish

_keeping_versions: Any = torch.autograd._unsafe_preserve_version_counter  # pyright: ignore[reportPrivateImportUsage]


class Sent:
    """Tensors of one dtype on their way from one rank to all.

    Args:
        group: all ranks.
        tensors: what the source has is sent as it is now; the others' are overwritten.
        source: the rank from which.
        apart: the tensors may be written to before the work is done.

    Attributes:
        on_device: the work runs on a device, so that the host need not wait for it.
    """

    def __init__(
        self, group: Group, tensors: Sequence[Tensor], source: int, *, apart: bool = False
    ) -> None:
        self._tensors = None if group.rank() == source else tuple(tensors)
        joined = _flatten_dense_tensors(tensors)
        self._joined = sendable(group, joined)
        if apart and len(tensors) == 1 and self._joined is joined:
            self._joined = joined.clone()
        self.on_device = self._joined.device.type != "cpu"
        self.work: Work = group.broadcast(self._joined.view(torch.uint8), source)
        if not self.on_device:
            unfinished.begun(self.work)

    def __repr__(self) -> str:
        return f"Sent({self._joined.nbytes} bytes of {self._joined.dtype})"

    @property
    def memory(self) -> Tensor:
        """The one tensor in which they are sent."""
        return self._joined

    def unpack(self) -> None:
        """Overwrites the tensors, once the work is done."""
        if self._tensors is not None:
            values = _unflatten_dense_tensors(self._joined, self._tensors)
            # As with DistributedDataParallel, a backward pass that has saved one goes on.
            with _keeping_versions(self._tensors):
                for tensor, value in zip(self._tensors, values, strict=True):
                    tensor.copy_(value)


def broadcast(group: Group, tensors: Sequence[Tensor], source: int = 0) -> None:
    """Overwrites tensors by those of one rank of the group; a collective call."""
    for batch in _batches(tensors):
        sent = Sent(group, batch, source)
        finish(sent.work, on_device=sent.on_device)
        sent.unpack()


def broadcast_of(group: Group, tensors: Sequence[Tensor], *, mine: bool) -> None:
    """As ``broadcast``, from the last rank for which ``mine`` is true."""
    broadcast(group, tensors, last_of(group, mine=mine))


def start_broadcast(group: Group, tensors: Sequence[Tensor], source: int) -> list[Sent]:
    """As ``broadcast``, but returns at once; the results are to be waited for, then unpacked."""
    return [Sent(group, batch, source, apart=True) for batch in _batches(tensors)]


def _batches(tensors: Sequence[Tensor], limit_bytes: int = 64 << 20) -> list[list[Tensor]]:
    """Groups tensors by dtype and device into batches small enough to need little extra memory."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    batches: list[list[Tensor]] = []
    for some in alike.values():
        room = -1
        for tensor in some:
            if tensor.nbytes > room:
                batches.append([])
                room = limit_bytes
            batches[-1].append(tensor)
            room -= tensor.nbytes
    return batches
