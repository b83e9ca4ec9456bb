"""The memory under tensors: which others lie over it, and how a tensor gets other memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

references: Any = torch._C._storage_Use_Count  # pyright: ignore[reportAttributeAccessIssue]
"""Counts the tensors that lie over a storage, given as its ``_cdata``."""


def _references_of_python() -> int:
    alone = torch.empty(1)
    return references(alone.untyped_storage()._cdata) - 1


FROM_PYTHON = _references_of_python()
"""References that torch itself counts besides the tensors: Python's object for the storage."""


def has_alias(tensor: Tensor) -> bool:
    """Whether another tensor lies over the memory of this one."""
    return references(tensor.untyped_storage()._cdata) > 1 + FROM_PYTHON


class _Span(NamedTuple):
    storage: int
    start: int
    stop: int


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two of these tensors may share memory."""
    spans = sorted(
        _Span(t.untyped_storage()._cdata, int(t.storage_offset()), _end(t))
        for t in tensors
        if t.numel()
    )
    return any(
        one.storage == other.storage and other.start < one.stop for one, other in pairwise(spans)
    )


def _end(tensor: Tensor) -> int:
    """The place in its storage just behind the tensor's last element in memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + 1 + sum((n - 1) * step for n, step in steps)


def with_own_storage(part: Tensor) -> Tensor:
    """The same memory under a storage of its own, which ends where the part does.

    So to save, pickle or share a parameter takes that parameter, and not its whole buffer; and the
    count of references shows whether other tensors lie over just this part.

    Args:
        part: contiguous, one-dimensional.
    """
    if not part.numel():
        return part.clone()
    data = part.view(torch.uint8)
    own = torch.from_numpy(data.numpy()) if data.is_cpu else torch.from_dlpack(data)
    return own.view(part.dtype)


def move(tensor: Tensor, here: Tensor) -> Tensor:
    """Gives a tensor, and all others over its memory, the memory of one that equals it."""
    if tensor.untyped_storage().nbytes() == here.untyped_storage().nbytes():
        exchange(tensor, here)
    else:
        tensor.data = here
    return tensor


def exchange(one: Tensor, other: Tensor) -> None:
    """Swaps the memory of two storages, for every tensor that lies over either of them."""
    storage: Any = one.untyped_storage()
    storage._swap_data_ptr_(other.untyped_storage())
