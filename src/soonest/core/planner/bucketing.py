"""Divides flat buffers into buckets, by sizes, layers, ranks and the network alone.

Why the first ones are small: [Note: why the first layer goes first] in ``planner.py``.

This never depends on times measured while training: with more than two ranks buckets and
methods decide how sums are rounded, and results must be equal from run to run (a calibration is
kept from one to the next, and so is which of several bucketings turned out to be the fastest).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from soonest.core.cost import Network
from soonest.core.plan import Bucket, Flat, shards
from soonest.core.trace import Trace

# Buckets at the front are small, because the first layer's gradient is the last to be ready and the
# first to be needed: nothing hides it. Each bucket may be as large as all before it together, so
# sizes double, up to one that does not keep others waiting for long. The last ones are smaller
# again, because the network idles until the first gradients of a backward pass fill a bucket.
# Between 14 and 32 parts simulated steps of real models differ by a percent or two; fewer are safer
# where an op takes many messages.
PARTS, PARTS_FOR_MANY, MANY_RANKS = 24.0, 16.0, 9
FRONT_PARTS = 256
BACK_SHARE = 1 / 4
# A bucket should be so large that it costs this many times as much as an empty one: smaller ones
# cost little but their latency. At the front they may be smaller than that by a factor.
WORTH, FRONT_WORTH = 2.0, 8.0
# A bucket may be this much smaller or larger than it should be to end at a border of a layer.
LOW, HIGH = 0.6, 1.4

_MOST_BYTES = float(1 << 40)


def flats_of(trace: Trace, itemsize: int = 4) -> tuple[Flat, ...]:
    """The flat buffer of a model of which only the trace is known: one parameter per layer."""
    sizes = [(layer.name, layer.name, -(-layer.bytes // itemsize)) for layer in trace.layers]
    dtype = {8: "float64", 4: "float32", 2: "bfloat16"}.get(itemsize, f"{itemsize} bytes")
    return (Flat.lay_out(dtype, itemsize, [entry for entry in sizes if entry[2]]),)


def make_buckets(
    flats: Sequence[Flat],
    network: Network,
    *,
    ranks: int,
    methods: Sequence[str] | None = None,
    coarseness: float = 1.0,
) -> tuple[Bucket, ...]:
    """Cuts flat buffers into buckets: small parameters are fused, large ones are sliced.

    Args:
        flats: the flat buffers.
        network: what each op costs; gives each bucket the cheapest method for its size.
        ranks: how many.
        methods: to choose from; all but sharding ones if None.
        coarseness: by which factor buckets are larger than usual; ``PARTS`` leaves two of each
            dtype, a small one for the first layers and the rest, and infinity leaves one.
    """
    methods = choices(network) if methods is None else methods
    total = sum(flat.numel * flat.itemsize for flat in flats)
    parts = PARTS_FOR_MANY if ranks >= MANY_RANKS else PARTS
    worth = worthwhile_bytes(network, methods)
    target = max(coarseness * total / parts, worth)
    smallest = max(coarseness * total / FRONT_PARTS, worth / FRONT_WORTH)
    return tuple(
        Bucket(
            index,
            start,
            stop,
            network.best((stop - start) * flat.itemsize, methods),
            layers_between(flat, start, stop),
        )
        for index, flat in enumerate(flats)
        if flat.slots
        for start, stop in pairwise(_cut_points(flat, smallest, target))
    )


def choices(network: Network) -> tuple[str, ...]:
    """The methods that a plan may use if the user has not said otherwise."""
    return tuple(method for method in network.methods if not shards(method))


def worthwhile_bytes(network: Network, methods: Sequence[str]) -> float:
    """The least size that costs ``WORTH`` times as much as none.

    For a line it is where half of the time goes into latency (R. W. Hockney's n 1/2).
    """

    def cost_s(size: float) -> float:
        return network.cost_s(network.best(size, methods), size)

    enough_s = WORTH * cost_s(0.0)
    low, high = 0.0, _MOST_BYTES if enough_s else 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_s(middle) < enough_s else (low, middle)
    return high


def _cut_points(flat: Flat, smallest: float, target: float) -> Iterator[int]:
    """Where a flat buffer is cut, both ends included, in elements."""
    slot_ends = [slot.start for slot in flat.slots[1:]] + [flat.numel]
    layers = [slot.layer for slot in flat.slots] + [None]
    changes = [a != b for a, b in pairwise(layers)]
    layer_ends = [end for end, change in zip(slot_ends, changes, strict=True) if change]
    whole = flat.numel * flat.itemsize
    at = 0
    yield at
    while at < flat.numel:
        behind = whole - at * flat.itemsize
        largest = min(target, max(behind / 2, target * BACK_SHARE))
        size = min(max(at * flat.itemsize, smallest), largest) / flat.itemsize
        if math.isinf(smallest) or (at and whole <= target):
            at = flat.numel
        else:
            at = _next_cut(flat, at, size, layer_ends, slot_ends)
        if (flat.numel - at) * flat.itemsize < smallest:
            at = flat.numel
        yield at


def _next_cut(flat: Flat, at: int, size: float, layer_ends: list[int], slot_ends: list[int]) -> int:
    """The end of the bucket that starts at ``at`` and should have ``size`` elements."""
    rest = layer_ends[bisect_right(layer_ends, at)] - at
    if rest > HIGH * size:
        size = rest / round(rest / size)  # Slices of one layer come out near equal.
    for ends in (layer_ends, slot_ends):
        low = bisect_left(ends, at + LOW * size)
        high = bisect_right(ends, at + HIGH * size)
        if low < high:
            return min(ends[low:high], key=lambda end: abs(end - at - size))
    if at + size > flat.numel:
        return flat.numel
    # No border is near, so a parameter as large as a whole bucket lies here: slice it.
    return at + max(1, round(size / flat.align)) * flat.align


def layers_between(flat: Flat, start: int, stop: int) -> tuple[str, ...]:
    """Names of the layers that own parameters, whole or in part, between two elements."""
    first = bisect_right(flat.slots, start, key=lambda slot: slot.start) - 1
    last = bisect_left(flat.slots, stop, key=lambda slot: slot.start)
    return tuple(dict.fromkeys(slot.layer for slot in flat.slots[max(first, 0) : last]))


def cut_points(flat: Flat, slice_bytes: float) -> list[int]:
    """Where a flat buffer may be cut, both ends included: between parameters and inside large ones.

    Args:
        flat: the flat buffer.
        slice_bytes: a parameter may be cut into slices of this size or a little larger.
    """
    ends = [*(slot.start for slot in flat.slots), flat.numel][1:]
    points = [0]
    for slot, end in zip(flat.slots, ends, strict=True):
        slices = int((end - slot.start) * flat.itemsize // slice_bytes) or 1
        step = (end - slot.start) / flat.align / slices
        points += [slot.start + round(number * step) * flat.align for number in range(1, slices)]
        points.append(end)
    return points
