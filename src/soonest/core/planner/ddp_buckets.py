"""The buckets that ``DistributedDataParallel`` would make.

They hold whole parameters, in the order in which a backward pass makes gradients. The first one is
closed early, so that sending starts soon (S. Li et al., "PyTorch Distributed: Experiences on
Accelerating Data Parallel Training", PVLDB 13, 2020).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from soonest.core.cost import Network
from soonest.core.plan import Bucket, Flat

FIRST_BYTES, CAP_BYTES = 1 << 20, 25 << 20
"""A bucket is closed when it holds so many: the first one, and the others. DDP's own defaults."""


def make_ddp_buckets(
    flats: Sequence[Flat], network: Network, *, methods: Sequence[str]
) -> tuple[Bucket, ...]:
    """Cuts flat buffers into buckets as DDP does with its default options.

    Args:
        flats: the flat buffers.
        network: what each op costs; only used where ``methods`` has no all-reduce.
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


def filled(sizes_bytes: Iterable[float], caps_bytes: Sequence[float]) -> list[int]:
    """How many pieces each bucket holds that is closed as soon as it has enough.

    Args:
        sizes_bytes: of the pieces, in the order in which they come.
        caps_bytes: what is enough for the first bucket and for those behind it; the last one
            holds for all that follow.
    """
    counts: list[int] = []
    held, size = 0, 0.0
    for piece in sizes_bytes:
        held, size = held + 1, size + piece
        if size >= caps_bytes[min(len(counts), len(caps_bytes) - 1)]:
            counts.append(held)
            held, size = 0, 0.0
    return [*counts, held] if held else counts


def _borders(flat: Flat) -> list[int]:
    """Where a flat buffer is cut, both ends included, in elements."""
    borders = [flat.numel, *(slot.start for slot in reversed(flat.slots))]
    sizes = [(stop - start) * flat.itemsize for stop, start in pairwise(borders)]
    ends = accumulate(filled(sizes, (FIRST_BYTES, CAP_BYTES)), initial=0)
    return [borders[end] for end in ends][::-1]
