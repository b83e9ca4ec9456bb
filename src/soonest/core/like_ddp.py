"""The buckets that ``DistributedDataParallel`` would make.

They hold whole parameters, in the order in which a backward pass makes gradients. The first one is
closed early, so that sending starts soon (S. Li et al., "PyTorch Distributed: Experiences on
Accelerating Data Parallel Training", PVLDB 13, 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from soonest.core.network import Network
from soonest.core.plan import Bucket, Flat

FIRST_BYTES, CAP_BYTES = 1 << 20, 25 << 20
"""A bucket is closed when it holds so many: the first one, and the others. DDP's own defaults."""


def cut_like_ddp(
    flats: Sequence[Flat], network: Network, *, methods: Sequence[str]
) -> tuple[Bucket, ...]:
    """Cuts flat buffers into buckets as DDP does with its default options.

    Args:
        flats: the flat buffers.
        network: what combining costs; only used where ``methods`` has no all-reduce.
        methods: to choose from.
    """
    return tuple(
        Bucket(
            index,
            start,
            stop,
            "allreduce"
            if "allreduce" in methods
            else network.best((stop - start) * flat.itemsize, methods),
            tuple(dict.fromkeys(slot.layer for slot in flat.slots if start <= slot.start < stop)),
        )
        for index, flat in enumerate(flats)
        if flat.slots
        for start, stop in pairwise(_borders(flat))
    )


def _borders(flat: Flat) -> list[int]:
    """Where a flat buffer is cut, both ends included, in elements."""
    borders, limit = [flat.numel], FIRST_BYTES
    for slot in reversed(flat.slots):
        if (borders[-1] - slot.start) * flat.itemsize >= limit or not slot.start:
            borders.append(slot.start)
            limit = CAP_BYTES
    return borders[::-1]
