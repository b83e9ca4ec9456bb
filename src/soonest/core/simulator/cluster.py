"""Steps of ranks that are not alike: stragglers, and compute times that vary.

A collective transfers once the last rank has issued it and ends on all ranks at the same time. So
all lanes wait for the same ops, and one lane that knows when the last rank is ready stands for
those of all ranks. The rest is arithmetic on arrays with a column for each rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.simulator.lane import Interval, Lane
from soonest.core.simulator.simulate import Run, timeline_of
from soonest.core.simulator.workload import Workload
from soonest.core.timeline import Timeline
from soonest.core.trace import Trace

Times = NDArray[np.float64]
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Some steps in a row of all ranks.

    Args:
        step_s: of each step, from the time when the last rank begins its backward pass to that when
            the last one begins the next; they add up to what training takes.
        timeline: the last step as one rank sees it, from its own backward pass to its next.
    """

    step_s: tuple[float, ...]
    timeline: Timeline

    @property
    def median_s(self) -> float:
        return median(self.step_s)


def simulate_ranks(
    trace: Trace,
    plan: Plan,
    network: Network,
    *,
    stragglers: Mapping[int, float] | None = None,
    jitter: float = 0.0,
    seed: int = 0,
    steps: int = 10,
    clip: bool = False,
    rank: int = 0,
    title: str = "soonest",
) -> Steps:
    """Steps in a row of all the ranks of a plan; each rank begins one when it has ended the last.

    All compute (forward, backward and updates) takes a rank's factor times as long as the trace
    says, times a draw of its own from a log-normal distribution whose mean is one. A first step, in
    which all ranks begin at the same time, is left out.

    Args:
        trace, plan, network, clip, title: see ``simulate``.
        stragglers: by rank, how many times as long as usual it computes.
        jitter: standard deviation of each compute time as a share of its mean.
        seed: of the draws; the same one gives the same steps.
        steps: how many.
        rank: whose last step becomes the timeline.

    Raises:
        ValueError: an argument is out of its range; see also ``simulate``.
    """
    factors = _factors(plan.ranks, stragglers or {})
    if not 0 <= jitter < math.inf:
        raise ValueError(f"jitter is {jitter!r}, but must be zero or more: a share, such as 0.05")
    if steps < 1:
        raise ValueError(f"steps is {steps!r}, but must be one or more")
    if not 0 <= rank < plan.ranks:
        raise ValueError(f"rank is {rank!r}, but must be from 0 to {plan.ranks - 1}")
    cluster = _Cluster(trace, plan, network, factors, jitter, np.random.default_rng(seed), clip)
    step = cluster.step(np.zeros(plan.ranks))
    ends = [step.end_s]
    for _ in range(steps):
        step = cluster.step(step.forwards[1][-1])
        ends.append(step.end_s)
    shown = timeline_of(trace, plan, network, cluster.seen_by(rank, step), title=title)
    return Steps(tuple(b - a for a, b in pairwise(ends)), shown)


def _factors(ranks: int, stragglers: Mapping[int, float]) -> Times:
    factors = np.ones(ranks)
    for rank, factor in stragglers.items():
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank!r} is no straggler: the ranks are 0 to {ranks - 1}")
        if not 0 < factor < math.inf:
            raise ValueError(
                f"straggler {rank} is to take {factor!r} times as long as others: give a factor "
                "above zero"
            )
        factors[rank] = factor
    return factors


class _Step(NamedTuple):
    """One step of all ranks; arrays have a column for each rank.

    Args:
        began: when the backward pass began.
        gradients: per layer, when its gradient was ready.
        lane: what was sent.
        norm: see ``Run``.
        updates: starts and ends, per layer or, where ranks update parts, per bucket.
        forwards: starts and ends, per layer.
    """

    began: Times
    gradients: Times
    lane: Lane
    norm: Interval | None
    updates: tuple[Times, Times]
    forwards: tuple[Times, Times]

    @property
    def end_s(self) -> float:
        """When the last rank has ended it."""
        return float(self.forwards[1][-1].max())


class _Cluster:
    """Ranks that run a plan, step by step; see ``simulate_ranks``."""

    def __init__(
        self,
        trace: Trace,
        plan: Plan,
        network: Network,
        factors: Times,
        jitter: float,
        draws: np.random.Generator,
        clip: bool,
    ) -> None:
        self._work = work = Workload.of(
            trace, plan.flats, plan.buckets, network, ranks=plan.ranks, clip=clip
        )
        jobs = [work.jobs[index] for index in work.sequence(plan.ops)]
        self._ops = [
            (job.bucket, job.latency_s, job.transfer_s, op.alone)
            for job, op in zip(jobs, plan.ops, strict=True)
        ]
        self._window, self._blocking = plan.window, plan.blocking
        self._backward_s = [layer.bwd_us * 1e-6 for layer in trace.layers]
        self._factors, self._draws = factors, draws
        self._sigma = math.sqrt(math.log1p(jitter**2))  # of the logarithm

    def _durations(self, usual_s: Sequence[float]) -> Times:
        """What takes so long usually, on every rank in one step."""
        durations = np.outer(usual_s, self._factors)
        if self._sigma:
            normal = self._draws.standard_normal(durations.shape, dtype=np.float32)
            durations *= np.exp(self._sigma * normal - self._sigma**2 / 2)
        return durations

    def step(self, began: Times) -> _Step:
        """One step, from when each rank begins it."""
        work, lane = self._work, Lane(self._window)
        gradients = began + np.cumsum(self._durations(self._backward_s)[::-1], axis=0)[::-1]
        stepped, norm = gradients[0], None
        ready = gradients.max(axis=1).tolist()
        at = [max((ready[layer] for layer in layers), default=0.0) for layers in work.layers_of]
        lane.send(self._ops[: work.reducing], at)
        if self._blocking or work.norm_s is not None:
            stepped = np.maximum(stepped, max(at, default=0.0))
            if work.sharded and work.norm_s is not None:
                start = float(stepped.max())
                norm = (start, start + work.norm_s)
                stepped = np.full_like(stepped, norm[1])
        if work.sharded:
            updates = _one_by_one(work.by_need, at, self._durations(work.part_s), stepped)
            at = updates[1].max(axis=1).tolist()
            lane.send(self._ops[work.reducing :], at)
            available = np.array(work.by_layer(at))
        else:
            durations = self._durations(work.update_s)
            updates = _one_by_one(work.by_need, work.by_layer(at), durations, stepped)
            available = updates[1]
        now = np.maximum(gradients[0], available.max(axis=0)) if self._blocking else gradients[0]
        forwards = self._forwards(now, available)
        return _Step(began, gradients, lane, norm, updates, forwards)

    def _forwards(self, now: Times, available: Times) -> tuple[Times, Times]:
        durations = self._durations(self._work.forward_s)
        starts, ends = np.empty_like(durations), np.empty_like(durations)
        for layer, there in enumerate(available):
            np.maximum(now, there, out=starts[layer])
            now = np.add(starts[layer], durations[layer], out=ends[layer])
        return starts, ends

    def seen_by(self, rank: int, step: _Step) -> Run:
        """A step in the time of one rank."""
        zero = float(step.began[rank])

        def intervals(times: tuple[Times, Times]) -> list[Interval]:
            starts, ends = (all_ranks[:, rank] - zero for all_ranks in times)
            return list(zip(starts.tolist(), ends.tolist(), strict=True))

        updated = set(self._work.by_need)
        updates = [
            interval if item in updated else None
            for item, interval in enumerate(intervals(step.updates))
        ]
        sharded = self._work.sharded
        return Run(
            gradients=(step.gradients[:, rank] - zero).tolist(),
            issued=[at - zero for at in step.lane.issued],
            transfers=[(start - zero, end - zero) for start, end in step.lane.transfers],
            norm=(step.norm[0] - zero, step.norm[1] - zero) if step.norm else None,
            updates=[None] * len(step.gradients) if sharded else updates,
            parts=updates if sharded else [],
            forwards=intervals(step.forwards),
        )


def _one_by_one(
    by_need: Sequence[int], ready_s: Sequence[float], duration_s: Times, from_s: Times
) -> tuple[Times, Times]:
    """What ``simulate`` does for a single rank: updates one item at a time, by need.

    Args:
        by_need: the items, the one needed first in front.
        ready_s: per item, on all ranks.
        duration_s: item by rank.
        from_s: per rank, when to begin.

    Returns:
        Starts and ends, item by rank; zero for items that are not needed.
    """
    starts, ends = np.zeros_like(duration_s), np.zeros_like(duration_s)
    items, ranks = np.array(by_need, dtype=np.intp), np.arange(len(from_s))
    ready = np.array(ready_s)[items]
    left = np.ones((len(ranks), len(items)), dtype=bool)
    waiting = np.zeros_like(left)
    everywhere = np.zeros(len(items), dtype=bool)  # ready on all ranks
    now = from_s.copy()
    for earliest in np.sort(ready):
        np.maximum(now, earliest, out=now)
        coming = np.flatnonzero(~everywhere & (ready <= now.max()))
        waiting[:, coming] = left[:, coming] & (ready[coming] <= now[:, None])
        everywhere |= ready <= now.min()
        place = waiting.argmax(axis=1)
        left[ranks, place] = waiting[ranks, place] = False
        item = items[place]
        starts[item, ranks] = now
        now += duration_s[item, ranks]
        ends[item, ranks] = now
    return starts, ends
