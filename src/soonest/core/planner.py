"""Chooses what is sent in one piece, and in which order.

The cut and the methods depend on sizes, layers, the number of ranks and the calibrated network,
never on times measured while training: with more than two ranks they decide how sums are rounded,
and results must be equal from run to run (a calibration is kept from one to the next, and so is
which of several cuts turned out to be the fastest). The order may depend on times, for it changes
no number.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from soonest.core.network import Network
from soonest.core.plan import METHODS, SHARED_PARAMETERS, Bucket, Flat, Op, Plan, shards
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
# A bucket should be so large that it costs this many times as much as an empty one: smaller ones
# cost little but their latency. At the front they may be smaller than that by a factor.
WORTH, FRONT_WORTH = 2.0, 8.0
# A bucket may be this much smaller or larger than it should be to end at a border of a layer.
LOW, HIGH = 0.6, 1.4

_MOST_BYTES = float(1 << 40)

MAX_WORK = 200_000
"""Ops and layers that the improvement of an order may simulate: a fraction of a second."""


def flats_of(trace: Trace, itemsize: int = 4) -> tuple[Flat, ...]:
    """The flat buffer of a model of which only the trace is known: one parameter per layer."""
    sizes = [(layer.name, layer.name, -(-layer.bytes // itemsize)) for layer in trace.layers]
    dtype = {8: "float64", 4: "float32", 2: "bfloat16"}.get(itemsize, f"{itemsize} bytes")
    return (Flat.lay_out(dtype, itemsize, [entry for entry in sizes if entry[2]]),)


def cut(
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
        network: what combining costs; gives each bucket the cheapest method for its size.
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
            _layers_between(flat, start, stop),
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
    ranks: int,
    window: int = 2,
) -> tuple[Op, ...]:
    """The order in which the buckets are sent, from the profile of a model.

    The transfers are jobs on one machine with heads and tails, 1 | r_i, q_i | Cmax. Schrage's
    heuristic gives an order (J. Carlier, "The one-machine sequencing problem", European Journal of
    Operational Research 11, 1982), and a bounded local search improves it in the simulator.
    """
    alone = _first_needed(trace, buckets)
    work = Workload.of(trace, flats, buckets, network, ranks=ranks, alone=alone)
    sequence = _improve(work, _schrage(work, window), window)
    jobs = (work.jobs[index] for index in sequence)
    return tuple(Op(job.bucket, job.kind, job.bucket in work.alone) for job in jobs)


def _first_needed(trace: Trace, buckets: Sequence[Bucket]) -> list[int]:
    """The bucket with which the next forward pass begins.

    Its gradients are ready when the backward pass ends, and then everything waits for it. Ops in
    flight at the same time share the network, so a large one behind it would slow it down.
    """
    first = next((layer.name for layer in trace.layers if layer.bytes), None)
    return [index for index, bucket in enumerate(buckets) if first in bucket.layers][:1]


def _schrage(work: Workload, window: int) -> list[int]:
    """Whenever the network gets free, sends what has the longest tail among what is ready."""
    jobs = work.jobs
    following = {job.before: index for index, job in enumerate(jobs) if job.before >= 0}
    coming = [(work.ready_of(job, 0.0), i) for i, job in enumerate(jobs) if job.before < 0]
    heapq.heapify(coming)
    combining = sum(job.kind != SHARED_PARAMETERS for job in jobs)
    sharing: list[tuple[float, int]] = []
    waiting: list[tuple[float, int]] = []
    least_latency_s = min((job.latency_s for job in jobs), default=0.0)
    sequence: list[int] = []
    ends: list[float] = []
    ended: dict[int, float] = {}
    end = 0.0
    while len(sequence) < len(jobs):
        behind = 1 if sequence and jobs[sequence[-1]].bucket in work.alone else window
        slot_free = ends[-behind] if len(ends) >= behind else 0.0
        # All that are ready by now can start their transfer at the same time.
        now = max(slot_free, end - least_latency_s)
        if not waiting and coming[0][0] > now:
            now = coming[0][0]
        while coming and coming[0][0] <= now:
            _, index = heapq.heappop(coming)
            heapq.heappush(waiting, (-work.tail_s[jobs[index].bucket], index))
        chosen = heapq.heappop(waiting)[1]
        job = jobs[chosen]
        ready_s = work.ready_of(job, ended.get(job.before, 0.0))
        end = ended[chosen] = max(max(slot_free, ready_s) + job.latency_s, end) + job.transfer_s
        sequence.append(chosen)
        ends.append(end)
        if chosen in following:
            after = following[chosen]
            shared = jobs[after].kind == SHARED_PARAMETERS
            heapq.heappush(sharing if shared else coming, (work.ready_of(jobs[after], end), after))
        if len(sequence) == combining:
            coming = sharing
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
    shorten the step. Slices of one parameter never pass each other, and no gradients parameters.
    """
    kinds = [work.layers_of[work.jobs[index].bucket] for index in sequence]
    shared = [work.jobs[index].kind == SHARED_PARAMETERS for index in sequence]
    for right in range(_critical(work, sequence, result), 0, -1):
        for left in range(right - 1, -1, -1):
            if shared[left] != shared[right]:
                break
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
    layer = waits[-1]
    carried = [work.layers_of[work.jobs[index].bucket] for index in sequence]
    return max(i for i, layers in enumerate(carried) if layer in layers)


def make_plan(
    trace: Trace,
    flats: Sequence[Flat],
    network: Network,
    *,
    ranks: int,
    window: int = 2,
    methods: Sequence[str] | None = None,
    coarseness: float = 1.0,
    pace: float = 1.0,
) -> Plan:
    """The plan for a model whose layers and network have been measured.

    Args:
        trace: its layers have the names of ``Slot.layer``.
        flats: the flat buffers.
        network: what combining costs.
        ranks: how many.
        window: how many ops may be in flight at once.
        methods, coarseness: see ``cut``.
        pace: transfers take so many times as long as ``network`` says. Only the order depends on
            this.
    """
    buckets = cut(flats, network, ranks=ranks, methods=methods, coarseness=coarseness)
    ops = order(trace, flats, buckets, network.slowed(pace), ranks=ranks, window=window)
    return Plan(ranks, tuple(flats), buckets, ops, window)


def first_plan(
    flats: Sequence[Flat],
    network: Network,
    *,
    ranks: int,
    window: int = 2,
    methods: Sequence[str] | None = None,
) -> Plan:
    """The plan before the model was measured: the order in which a backward pass makes gradients.

    Flat buffers side by side are walked at the same relative pace. Parameters that are shared
    behind an update come in the order in which a forward pass needs them.
    """
    buckets = cut(flats, network, ranks=ranks, methods=methods)
    return Plan(ranks, tuple(flats), buckets, backward_order(flats, buckets), window)


def backward_order(flats: Sequence[Flat], buckets: Sequence[Bucket]) -> tuple[Op, ...]:
    """The ops in the order in which a backward pass makes gradients; see ``first_plan``."""
    backward = sorted(
        range(len(buckets)),
        key=lambda i: (-buckets[i].stop / flats[buckets[i].flat].numel, buckets[i].flat),
    )
    ops = [Op(i, kind) for i in backward for kind in METHODS[buckets[i].method]]
    ahead = [op for op in ops if op.kind != SHARED_PARAMETERS]
    behind = [op for op in reversed(ops) if op.kind == SHARED_PARAMETERS]
    return (*ahead, *behind)
