"""What may be said of how to train, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist

from soonest.core.plan import Plan
from soonest.runtime.comm import Wire


@dataclass(frozen=True, kw_only=True)
class Options:
    """The further arguments of ``prioritize``, which documents them at length."""

    process_group: dist.ProcessGroup | None = None
    """The ranks that train together; None for the default group."""
    timeout_s: float | None = None
    """How long a collective may take, seconds; None for as long as the group's own may."""
    plan: Plan | str | Path | None = None
    """A plan to keep to, or the file of one; None to search for the fastest."""
    separable: bool | None = None
    """Whether the optimizer updates each parameter by itself; None to decide by its class."""
    method: str | None = None
    """How to reduce every bucket, a key of ``METHODS``; None for the cheapest by size."""
    shard_optimizer: bool = False
    """Each rank keeps and updates only its part of the optimizer's state."""
    wire_dtype: torch.dtype | None = None
    """The dtype in which gradients are sent; None for their own."""
    parameter_wire_dtype: torch.dtype | None = None
    """The dtype in which sharded parameters are sent; None for their own."""
    broadcast_buffers: bool = True
    """Every rank gets the first one's buffers when ``DistributedDataParallel`` would send them."""

    @property
    def wire(self) -> Wire:
        """The dtypes in which gradients and parameters are sent."""
        return Wire(self.wire_dtype, self.parameter_wire_dtype)


class Keywords(TypedDict, total=False):
    """The same, for type checkers: what ``prioritize`` takes by keyword."""

    process_group: dist.ProcessGroup | None
    timeout_s: float | None
    plan: Plan | str | Path | None
    separable: bool | None
    method: str | None
    shard_optimizer: bool
    wire_dtype: torch.dtype | None
    parameter_wire_dtype: torch.dtype | None
    broadcast_buffers: bool
