"""In which order given buckets are sent. It may depend on times: it changes no number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from soonest.core.cost import Network
from soonest.core.plan import GATHER_PARAMETERS, Bucket, Flat, Op
from soonest.core.planner.descent import descend
from soonest.core.planner.dispatch import Chain, dispatch
from soonest.core.simulator.simulate import Run, run
from soonest.core.simulator.workload import Workload
from soonest.core.trace import Trace

_GAIN = 1e-9
"""A change must shorten the step by this fraction to be made: more than what is rounded."""
MAX_WORK = 200_000
"""How many ops and layers the descent may simulate: a fraction of a second."""


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

    What is the most urgent of what is ready goes first, see ``dispatch``, and a bounded local
    search improves that order in the simulator.
    """
    alone = first_needed(trace, buckets)
    work = Workload.of(trace, flats, buckets, network, ranks=ranks, alone=alone)
    sequence = _improved(work, _dispatched(work, window), window)
    jobs = (work.jobs[index] for index in sequence)
    return tuple(Op(job.bucket, job.kind, job.bucket in work.alone) for job in jobs)


def first_needed(trace: Trace, buckets: Sequence[Bucket]) -> list[int]:
    """The bucket with which the next forward pass begins.

    Its gradients are ready when the backward pass ends, and then everything waits for it. Ops in
    flight at the same time share the network, so a large one behind it would slow it down.
    """
    first = next((layer.name for layer in trace.layers if layer.bytes), None)
    return [index for index, bucket in enumerate(buckets) if first in bucket.layers][:1]


def _dispatched(work: Workload, window: int) -> list[int]:
    """The jobs of a workload as ``dispatch`` puts them in order."""
    ops: list[list[tuple[float, float, bool]]] = [[] for _ in work.ready_s]
    first: list[int] = [0] * len(ops)
    for index, job in enumerate(work.jobs):
        if not ops[job.bucket]:
            first[job.bucket] = index
        ops[job.bucket].append((job.latency_s, job.transfer_s, job.kind == GATHER_PARAMETERS))
    chains = [
        Chain(work.ready_s[i], work.tail_s[i], work.part_s[i], chain, i in work.alone)
        for i, chain in enumerate(ops)
    ]
    order = dispatch(chains, backward_s=work.backward_s, window=window)
    return [first[bucket] + stage for bucket, stage in order]


def _improved(work: Workload, sequence: list[int], window: int) -> list[int]:
    """Moves single ops as long as that shortens the step."""
    left = MAX_WORK

    def timed(order: list[int], _limit_s: float) -> float:
        nonlocal left
        left -= len(order) + len(work.forward_s)
        return run(work, order, window).step_s if left >= 0 else math.inf

    _, sequence = descend(
        sequence,
        run(work, sequence, window).step_s,
        [lambda order: _moves(work, order, run(work, order, window))],
        timed=timed,
        gain=_GAIN,
        is_spent=lambda: left < 0,
    )
    return sequence


def _moves(work: Workload, sequence: list[int], result: Run) -> Iterator[list[int]]:
    """Orders in which one op comes later or earlier, none behind the critical op.

    The critical op is the one for which the forward pass last stood still: no change behind it can
    shorten the step. Slices of one parameter never pass each other, and no gradients parameters.
    """
    kinds = [work.layers_of[work.jobs[index].bucket] for index in sequence]
    gathers = [work.jobs[index].kind == GATHER_PARAMETERS for index in sequence]
    for right in range(_critical(work, sequence, result), 0, -1):
        for left in range(right - 1, -1, -1):
            if gathers[left] != gathers[right]:
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
