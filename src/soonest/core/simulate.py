"""One steady-state step under a plan, simulated.

The model of the network: an op first waits out its latency and then transfers. The latency of an
op in flight passes while others transfer, but transfers are serial, in the order of issue, because
they share the same links. So a window of two hides the latency of every op whose predecessor
transfers for at least as long, and a window of one hides none.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from soonest.core.network import Network
from soonest.core.plan import METHODS, SHARED_PARAMETERS, Bucket, Flat, Plan
from soonest.core.timeline import Span, Timeline
from soonest.core.trace import Trace


@dataclass(frozen=True, slots=True)
class Job:
    """One op of one bucket, in numbers.

    Args:
        bucket: index of the bucket.
        kind: of the op.
        latency_s: passes while others transfer.
        transfer_s: how long it keeps the network to itself.
        before: index of the job of the same bucket that comes before it; -1 for the first one.
        last: whether the bucket is combined or, if its parameters are shared, in place with it.
    """

    bucket: int
    kind: str
    latency_s: float
    transfer_s: float
    before: int
    last: bool


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace, its buckets and a network in numbers, to be run under any order of the ops.

    Args:
        jobs: the ops of all buckets, by bucket, and of one bucket in their order.
        ready_s: per bucket, when the gradients of all layers that it carries are ready.
        tail_s: per bucket, the forward computation that cannot start before it landed.
        layers_of: per bucket, the indices of the layers that it carries.
        part_s: per bucket, how long a rank takes to update its part, where it is sharded.
        backward_s: length of the backward pass.
        forward_s, update_s: per layer.
        alone: buckets behind whose ops no other is issued before they are done.
    """

    jobs: list[Job]
    ready_s: list[float]
    tail_s: list[float]
    layers_of: list[list[int]]
    part_s: list[float]
    backward_s: float
    forward_s: list[float]
    update_s: list[float]
    alone: frozenset[int]

    @classmethod
    def of(
        cls,
        trace: Trace,
        flats: Sequence[Flat],
        buckets: Sequence[Bucket],
        network: Network,
        *,
        ranks: int,
        alone: Iterable[int] = (),
    ) -> Workload:
        """Raises ``ValueError`` where a bucket carries a layer that the trace does not have."""
        index = {layer.name: i for i, layer in enumerate(trace.layers)}
        try:
            layers_of = [[index[name] for name in bucket.layers] for bucket in buckets]
        except KeyError as missing:
            raise ValueError(
                f"the plan sends layer {missing}, but trace {trace.model!r} has no such layer"
            ) from None
        ready, tail = trace.ready_s(), trace.tail_s()
        update_per_byte = trace.update_us * 1e-6 / max(1, trace.total_bytes)
        sizes = [(b.stop - b.start) * flats[b.flat].itemsize for b in buckets]
        jobs: list[Job] = []
        for bucket, size in enumerate(sizes):
            kinds = METHODS[buckets[bucket].method]
            for stage, kind in enumerate(kinds):
                cost = network.op(kind)
                before = len(jobs) - 1 if stage else -1
                transfer_s, last = cost.transfer_s(size), stage == len(kinds) - 1
                jobs.append(Job(bucket, kind, cost.latency_s, transfer_s, before, last))
        return cls(
            jobs=jobs,
            ready_s=[max((ready[i] for i in layers), default=0.0) for layers in layers_of],
            tail_s=[max((tail[i] for i in layers), default=0.0) for layers in layers_of],
            layers_of=layers_of,
            part_s=[size * update_per_byte / ranks for size in sizes],
            backward_s=ready[0],
            forward_s=[layer.fwd_us * 1e-6 for layer in trace.layers],
            update_s=[layer.bytes * update_per_byte for layer in trace.layers],
            alone=frozenset(alone),
        )

    def ready_of(self, job: Job, before_s: float) -> float:
        """When a job can be issued, if the one before it of the same bucket ended then."""
        if job.kind == SHARED_PARAMETERS:  # after the update, which ``optimizer.step()`` allows
            return max(before_s, self.backward_s) + self.part_s[job.bucket]
        return self.ready_s[job.bucket] if job.before < 0 else before_s


@dataclass(frozen=True, slots=True)
class Run:
    """When everything happened; seconds since the backward pass began.

    Args:
        transfers: per op, start and end of its transfer; its latency is just before.
        updates: per layer, start and end of its update; None if it has nothing to send, or if each
            rank updates but a part of it.
        forwards: per layer, start and end of its forward computation.
    """

    transfers: list[tuple[float, float]]
    updates: list[tuple[float, float] | None]
    forwards: list[tuple[float, float]]

    @property
    def step_s(self) -> float:
        return self.forwards[-1][1]


def run(work: Workload, order: Sequence[int], window: int, *, blocking: bool = False) -> Run:
    """Runs one step.

    Args:
        work: what to run.
        order: indices of all jobs, in the order of issue; those of a bucket in theirs.
        window: how many ops may be in flight.
        blocking: no parameter is updated before all ops are done, and no forward computation starts
            before all updates are.
    """
    transfers: list[tuple[float, float]] = []
    ended = [0.0] * len(work.jobs)
    combined: list[float | None] = [None] * len(work.forward_s)
    landed = [0.0] * len(work.forward_s)
    issued = end = 0.0
    alone = False
    for position, index in enumerate(order):
        job = work.jobs[index]
        behind = 1 if alone else window
        slot_free = transfers[position - behind][1] if position >= behind else 0.0
        # Behind the op in front, whatever is ready: neither is issued nor transfers before it.
        issued = max(issued, work.ready_of(job, ended[job.before]), slot_free)
        start = max(issued + job.latency_s, end)
        end = ended[index] = start + job.transfer_s
        transfers.append((start, end))
        alone = job.bucket in work.alone
        if job.last:
            shared = job.kind == SHARED_PARAMETERS
            for layer in work.layers_of[job.bucket]:
                if shared:
                    landed[layer] = end
                else:
                    combined[layer] = end
    now = work.backward_s
    if blocking:
        combined = [None if at is None else end for at in combined]
    updates = _updates(work, combined)
    if blocking:
        now = max([now, *landed, *(update[1] for update in updates if update)])
    forwards: list[tuple[float, float]] = []
    for duration, update, there in zip(work.forward_s, updates, landed, strict=True):
        start = max(now, there, update[1] if update else 0.0)
        now = start + duration
        forwards.append((start, now))
    return Run(transfers, updates, forwards)


def _updates(work: Workload, combined: Sequence[float | None]) -> list[tuple[float, float] | None]:
    """Updates one layer at a time, the one needed first among those whose gradients are combined.

    None starts before the backward pass ended, because ``optimizer.step()`` is called after it.
    """
    updates: list[tuple[float, float] | None] = [None] * len(combined)
    coming = sorted(
        (max(at, work.backward_s), i) for i, at in enumerate(combined) if at is not None
    )
    waiting: list[int] = []
    now, arrived = 0.0, 0
    while arrived < len(coming) or waiting:
        if not waiting:
            now = max(now, coming[arrived][0])
        while arrived < len(coming) and coming[arrived][0] <= now:
            heapq.heappush(waiting, coming[arrived][1])
            arrived += 1
        layer = heapq.heappop(waiting)
        updates[layer] = (now, now + work.update_s[layer])
        now += work.update_s[layer]
    return updates


def _run_plan(trace: Trace, plan: Plan, network: Network) -> Run:
    alone = [op.bucket for op in plan.ops if op.alone]
    work = Workload.of(trace, plan.flats, plan.buckets, network, ranks=plan.ranks, alone=alone)
    index = {(job.bucket, job.kind): i for i, job in enumerate(work.jobs)}
    order = [index[op.bucket, op.kind] for op in plan.ops]
    return run(work, order, plan.window, blocking=plan.blocking)


def step_time_s(trace: Trace, plan: Plan, network: Network) -> float:
    """Seconds of one steady-state step; see ``simulate``."""
    return _run_plan(trace, plan, network).step_s


def simulate(trace: Trace, plan: Plan, network: Network, *, title: str = "soonest") -> Timeline:
    """One steady-state step, from the start of a backward pass to the start of the next one.

    A bucket is ready when the gradients of all its layers are. Ops are issued strictly in the
    order of the plan, at most ``plan.window`` in flight. A layer is updated when all its buckets
    are combined, and its forward computation waits for that; or, if the plan blocks, for all.
    """
    result = _run_plan(trace, plan, network)
    spans: list[Span] = []
    backward_at = 0.0
    for layer, ready in zip(reversed(trace.layers), reversed(trace.ready_s()), strict=True):
        spans.append(Span("compute", "backward", layer.name, backward_at, ready))
        backward_at = ready
    now = backward_at
    for layer, (start, end) in zip(trace.layers, result.forwards, strict=True):
        if start > now:
            spans.append(Span("compute", "wait", layer.name, now, start))
        spans.append(Span("compute", "forward", layer.name, start, end))
        now = end
    for op, (start, end) in zip(plan.ops, result.transfers, strict=True):
        name = plan.describe(op.bucket)
        latency_s = network.op(op.kind).latency_s
        spans.append(Span("network", "send", name, start - latency_s, end))
    for layer, update in zip(trace.layers, result.updates, strict=True):
        if update:
            spans.append(Span("update", "update", layer.name, *update))
    return Timeline(title, result.step_s, tuple(spans))
