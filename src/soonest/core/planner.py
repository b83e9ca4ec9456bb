"""Chooses what is sent in one piece, and in which order.

The cut depends on sizes, layers and the number of ranks only, never on measured times: with more
than two ranks the cut points decide how sums are rounded, and results must be equal from run to
run. The order may depend on times, for it changes no number. With two ranks nothing does, so there
coarser cuts may be tried.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from soonest.core.network import Network
from soonest.core.plan import METHODS, Bucket, Flat, Op, Plan
from soonest.core.simulate import Run, Workload, run
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
# With fewer bytes per rank than this, an op costs its latency and little else.
TARGET_FLOOR_BYTES, SMALLEST_FLOOR_BYTES = 16 << 10, 2 << 10
# A bucket may be this much smaller or larger than it should be to end at a border of a layer.
LOW, HIGH = 0.6, 1.4

MAX_WORK = 200_000
"""Ops and layers that the improvement of an order may simulate: a fraction of a second."""


def flats_of(trace: Trace, itemsize: int = 4) -> tuple[Flat, ...]:
    """The flat buffer of a model of which only the trace is known: one parameter per layer."""
    sizes = [(layer.name, layer.name, -(-layer.bytes // itemsize)) for layer in trace.layers]
    dtype = {8: "float64", 4: "float32", 2: "bfloat16"}.get(itemsize, f"{itemsize} bytes")
    return (Flat.lay_out(dtype, itemsize, [entry for entry in sizes if entry[2]]),)


def cut(
    flats: Sequence[Flat], *, ranks: int, method: str = "allreduce", coarseness: float = 1.0
) -> tuple[Bucket, ...]:
    """Cuts flat buffers into buckets: small parameters are fused, large ones are sliced.

    Args:
        flats: the flat buffers.
        ranks: how many.
        method: of all buckets.
        coarseness: by which factor buckets are larger than usual; ``PARTS`` leaves two of each
            dtype, a small one for the first layers and the rest, and infinity leaves one.
    """
    total = sum(flat.numel * flat.itemsize for flat in flats)
    parts = PARTS_FOR_MANY if ranks >= MANY_RANKS else PARTS
    target = max(coarseness * total / parts, TARGET_FLOOR_BYTES * ranks)
    smallest = max(coarseness * total / FRONT_PARTS, SMALLEST_FLOOR_BYTES * ranks)
    return tuple(
        Bucket(index, start, stop, method, _layers_between(flat, start, stop))
        for index, flat in enumerate(flats)
        if flat.slots
        for start, stop in pairwise(_cut_points(flat, smallest, target))
    )


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


def _layers_between(flat: Flat, start: int, stop: int) -> tuple[str, ...]:
    first = bisect_right(flat.slots, start, key=lambda slot: slot.start) - 1
    last = bisect_left(flat.slots, stop, key=lambda slot: slot.start)
    return tuple(dict.fromkeys(slot.layer for slot in flat.slots[max(first, 0) : last]))


def order(
    trace: Trace,
    flats: Sequence[Flat],
    buckets: Sequence[Bucket],
    network: Network,
    *,
    window: int = 2,
) -> tuple[Op, ...]:
    """The order in which the buckets are sent, from the profile of a model.

    The transfers are jobs on one machine with heads and tails, 1 | r_i, q_i | Cmax. Schrage's
    heuristic gives an order (J. Carlier, "The one-machine sequencing problem", European Journal of
    Operational Research 11, 1982), and a bounded local search improves it in the simulator.
    """
    alone = _first_needed(trace, buckets)
    work = Workload.of(trace, flats, buckets, network, alone=alone)
    return _ops(buckets, _improve(work, _schrage(work, window), window), alone)


def _ops(
    buckets: Sequence[Bucket], sequence: Sequence[int], alone: Sequence[int] = ()
) -> tuple[Op, ...]:
    return tuple(
        Op(index, kind, index in alone)
        for index in sequence
        for kind in METHODS[buckets[index].method]
    )


def _first_needed(trace: Trace, buckets: Sequence[Bucket]) -> list[int]:
    """The bucket with which the next forward pass begins.

    Its gradients are ready when the backward pass ends, and then everything waits for it. Ops in
    flight at the same time share the network, so a large one behind it would slow it down.
    """
    first = next((layer.name for layer in trace.layers if layer.bytes), None)
    return [index for index, bucket in enumerate(buckets) if first in bucket.layers][:1]


def _schrage(work: Workload, window: int) -> list[int]:
    """Whenever the network gets free, sends the bucket with the longest tail among those ready."""
    coming = sorted(range(len(work.ready_s)), key=lambda i: (work.ready_s[i], i))
    waiting: list[tuple[float, int]] = []
    sequence: list[int] = []
    ends: list[float] = []
    end = 0.0
    arrived = 0
    while len(sequence) < len(coming):
        behind = 1 if sequence and sequence[-1] in work.alone else window
        slot_free = ends[-behind] if len(ends) >= behind else 0.0
        # All that are ready by now can start their transfer at the same time.
        now = max(slot_free, end - work.latency_s)
        if not waiting and work.ready_s[coming[arrived]] > now:
            now = work.ready_s[coming[arrived]]
        while arrived < len(coming) and work.ready_s[coming[arrived]] <= now:
            heapq.heappush(waiting, (-work.tail_s[coming[arrived]], coming[arrived]))
            arrived += 1
        chosen = heapq.heappop(waiting)[1]
        issued = max(slot_free, work.ready_s[chosen])
        end = max(issued + work.latency_s, end) + work.transfer_s[chosen]
        sequence.append(chosen)
        ends.append(end)
    return sequence


def _improve(work: Workload, sequence: list[int], window: int) -> list[int]:
    """Moves single ops as long as that shortens the step."""
    best = run(work, sequence, window)
    budget = MAX_WORK
    improved = True
    while improved:
        improved = False
        for candidate in _moves(work, sequence, best):
            budget -= len(sequence) + len(work.forward_s)
            if budget < 0:
                return sequence
            tried = run(work, candidate, window)
            if tried.step_s < best.step_s * (1 - 1e-9):
                sequence, best, improved = candidate, tried, True
                break
    return sequence


def _moves(work: Workload, sequence: list[int], result: Run) -> Iterator[list[int]]:
    """Orders in which one op comes later or earlier, none behind the critical op.

    The critical op is the one for which the forward pass last stood still: no change behind it can
    shorten the step. Slices of one parameter never pass each other.
    """
    kinds = [work.layers_of[bucket] for bucket in sequence]
    for right in range(_critical(work, sequence, result), 0, -1):
        for left in range(right - 1, -1, -1):
            between = sequence[left + 1 : right]
            head, tail = sequence[:left], sequence[right + 1 :]
            if kinds[left] not in kinds[left + 1 : right + 1]:
                yield [*head, *between, sequence[right], sequence[left], *tail]
            if kinds[right] not in kinds[left:right]:
                yield [*head, sequence[right], sequence[left], *between, *tail]


def _critical(work: Workload, sequence: list[int], result: Run) -> int:
    """Position of the op for which the forward pass last stood still; 0 if it never did."""
    before = [work.backward_s] + [end for _, end in result.forwards]
    waits = [i for i, (start, _) in enumerate(result.forwards) if start > before[i]]
    if not waits:
        return 0
    return max(i for i, bucket in enumerate(sequence) if waits[-1] in work.layers_of[bucket])


def make_plan(
    trace: Trace,
    flats: Sequence[Flat],
    network: Network,
    *,
    ranks: int,
    window: int = 2,
    coarseness: float = 1.0,
) -> Plan:
    """The plan for a model whose layers and network have been measured.

    Args:
        trace: its layers have the names of ``Slot.layer``.
        flats: the flat buffers.
        network: cost of an all-reduce.
        ranks: how many.
        window: how many ops may be in flight at once.
        coarseness: see ``cut``.
    """
    buckets = cut(flats, ranks=ranks, coarseness=coarseness)
    ops = order(trace, flats, buckets, network, window=window)
    return Plan(ranks, tuple(flats), buckets, ops, window)


def first_plan(flats: Sequence[Flat], *, ranks: int, window: int = 2) -> Plan:
    """The plan before anything was measured: the order in which a backward pass makes gradients.

    Flat buffers side by side are walked at the same relative pace.
    """
    buckets = cut(flats, ranks=ranks)
    sequence = sorted(
        range(len(buckets)),
        key=lambda i: (-buckets[i].stop / flats[buckets[i].flat].numel, buckets[i].flat),
    )
    return Plan(ranks, tuple(flats), buckets, _ops(buckets, sequence), window)
