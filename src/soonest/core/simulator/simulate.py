"""One steady-state step under a plan, simulated.

What the network and the updates do is in ``lane``; here it meets the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.simulator.lane import Interval, Lane, one_by_one
from soonest.core.simulator.workload import Workload
from soonest.core.timeline import Span, Timeline
from soonest.core.trace import Trace


@dataclass(frozen=True, slots=True)
class Run:
    """When everything happened; seconds since the backward pass began.

    Args:
        gradients: per layer, when its gradient was ready.
        issued: per op, when it was issued.
        transfers: per op, its transfer; its latency is just before.
        norm: the op that sums the norms of gradients over the ranks; None if there is none.
        updates: per layer, its update; None if it has nothing to send, or if each rank updates but
            a part of it.
        parts: per bucket, the update of a rank's part of it; empty if ranks update everything.
        forwards: per layer, its forward computation.
    """

    gradients: Sequence[float]
    issued: Sequence[float]
    transfers: Sequence[Interval]
    norm: Interval | None
    updates: Sequence[Interval | None]
    parts: Sequence[Interval | None]
    forwards: Sequence[Interval]

    @property
    def step_s(self) -> float:
        """Length of the step: the end of the last forward computation, seconds."""
        return self.forwards[-1][1]


def run(
    work: Workload,
    order: Sequence[int],
    window: int,
    *,
    alone: Sequence[bool] | None = None,
    blocking: bool = False,
) -> Run:
    """Runs one step.

    Args:
        work: what to run.
        order: indices of all jobs, in the order of issue; those of a bucket in theirs, and those
            that gather parameters behind all others.
        window: how many ops may be in flight.
        alone: per op of the order, whether no other is issued behind it before it is done; those
            of the buckets in ``work.alone`` if None.
        blocking: nothing is updated before all gradients are reduced, and no forward computation
            starts before all parameters are there.
    """
    jobs = [work.jobs[index] for index in order]
    if alone is None:
        alone = [job.bucket in work.alone for job in jobs]
    ops = [
        (job.bucket, job.latency_s, job.transfer_s, last)
        for job, last in zip(jobs, alone, strict=True)
    ]
    lane = Lane(window)
    at = list(work.ready_s)
    lane.send(ops[: work.reducing], at)
    stepped, norm = work.backward_s, None  # ``optimizer.step()`` is called after it.
    if blocking or work.norm_s is not None:
        stepped = max([stepped, *at])
        if work.sharded and work.norm_s is not None:
            norm = (stepped, stepped + work.norm_s)
            stepped += work.norm_s
    updates: list[Interval | None] = [None] * len(work.forward_s)
    parts: list[Interval | None] = []
    if work.sharded:
        parts = one_by_one(work.by_need, at, work.part_s, stepped)
        at = [part[1] if part else 0.0 for part in parts]
        lane.send(ops[work.reducing :], at)
        available = work.by_layer(at)
    else:
        updates = one_by_one(work.by_need, work.by_layer(at), work.update_s, stepped)
        available = [update[1] if update else 0.0 for update in updates]
    forwards: list[Interval] = []
    now = max([work.backward_s, *available]) if blocking else work.backward_s
    for duration, there in zip(work.forward_s, available, strict=True):
        start = max(now, there)
        now = start + duration
        forwards.append((start, now))
    return Run(work.gradient_s, lane.issued, lane.transfers, norm, updates, parts, forwards)


def _run_plan(trace: Trace, plan: Plan, network: Network, clip: bool) -> Run:
    work = Workload.of(trace, plan.flats, plan.buckets, network, ranks=plan.ranks, clip=clip)
    alone = [op.alone for op in plan.ops]
    return run(work, work.sequence(plan.ops), plan.window, alone=alone, blocking=plan.blocking)


def step_time_s(trace: Trace, plan: Plan, network: Network, *, clip: bool = False) -> float:
    """Seconds of one steady-state step; see ``simulate``."""
    return _run_plan(trace, plan, network, clip).step_s


def simulate(
    trace: Trace, plan: Plan, network: Network, *, clip: bool = False, title: str = "soonest"
) -> Timeline:
    """One steady-state step, from the start of a backward pass to the start of the next one.

    A bucket is ready when the gradients of all its layers are. Ops are issued strictly in the
    order of the plan, at most ``plan.window`` in flight. After the backward pass a layer is updated
    when all its buckets are reduced, and its forward computation waits for that. Where the plan
    shards, a rank updates its part of a bucket instead, then all parts are gathered, and the
    forward computation of a layer waits for all its buckets. Updates run one at a time, what is
    needed first in front. If the plan blocks, everything waits for everything.

    Args:
        trace: the model.
        plan: what is sent, how, and in which order.
        network: what each op costs.
        clip: gradients are clipped by the norm of all of them, so no update starts before all are
            reduced and, where the plan shards, the norms of the ranks' parts are summed.
        title: of the timeline.

    Raises:
        ValueError: the plan sends a layer that the trace does not have, or by a method whose cost
            is not known.
    """
    return timeline_of(trace, plan, network, _run_plan(trace, plan, network, clip), title=title)


def timeline_of(trace: Trace, plan: Plan, network: Network, result: Run, *, title: str) -> Timeline:
    """A step that was run as a timeline."""
    spans: list[Span] = []
    now = 0.0
    for layer, ready in zip(reversed(trace.layers), reversed(result.gradients), strict=True):
        spans.append(Span("compute", "backward", layer.name, now, ready))
        now = ready
    for layer, (start, end) in zip(trace.layers, result.forwards, strict=True):
        if start > now:
            spans.append(Span("compute", "wait", layer.name, now, start))
        spans.append(Span("compute", "forward", layer.name, start, end))
        now = end
    for op, (start, end) in zip(plan.ops, result.transfers, strict=True):
        name = plan.describe(op.bucket)
        latency_s = network.op(op.kind).latency_at(plan.bucket_bytes(op.bucket))
        spans.append(Span("network", "send", name, start - latency_s, end))
    if result.norm:
        spans.append(Span("network", "send", "norm of all gradients", *result.norm))
    for layer, update in zip(trace.layers, result.updates, strict=True):
        if update:
            spans.append(Span("update", "update", layer.name, *update))
    for bucket, part in enumerate(result.parts):
        if part:
            spans.append(Span("update", "update", plan.describe(bucket), *part))
    return Timeline(title, result.step_s, tuple(spans))
