"""In which order the buckets of a cut are sent. It may depend on times: it changes no number."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from soonest.core.cost import Network
from soonest.core.plan import SHARED_PARAMETERS, Bucket, Flat, Op
from soonest.core.simulator.simulate import Run, Workload, run
from soonest.core.trace import Trace

MAX_WORK = 200_000
"""Ops and layers that the improvement of an order may simulate: a fraction of a second."""


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
    alone = first_needed(trace, buckets)
    work = Workload.of(trace, flats, buckets, network, ranks=ranks, alone=alone)
    sequence = _improve(work, _schrage(work, window), window)
    jobs = (work.jobs[index] for index in sequence)
    return tuple(Op(job.bucket, job.kind, job.bucket in work.alone) for job in jobs)


def first_needed(trace: Trace, buckets: Sequence[Bucket]) -> list[int]:
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
    issued = end = 0.0
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
        issued = max(issued, slot_free, ready_s)
        end = ended[chosen] = max(issued + job.latency_s, end) + job.transfer_s
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
