"""Steps of a plan as discrete events in simpy: ranks, lanes and a network that are processes.

It knows nothing of the simulator's recurrences and is slow: what happens follows from who waits for
whom. It is what the simulator is held against.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence

import simpy

from soonest.core.cost import Network
from soonest.core.plan import GATHER_PARAMETERS, METHODS, Plan
from soonest.core.timeline import Timeline
from soonest.core.trace import Trace

Seen = tuple[str, str, float, float]
"""Kind, name, start and end of one span."""


def spans(timeline: Timeline) -> list[Seen]:
    """All but the waits, sorted."""
    kept = (span for span in timeline.spans if span.kind != "wait")
    return sorted((span.kind, span.name, span.start_s, span.end_s) for span in kept)


def flat(seen: Sequence[Seen]) -> list[float]:
    """Their times one after the other."""
    return [at for *_, start, end in seen for at in (start, end)]


class Together:
    """What all ranks share in one step: each op begins when the last of them has issued it."""

    def __init__(self, env: simpy.Environment, plan: Plan, network: Network) -> None:
        self._env, self._plan = env, plan
        self._costs = [network.op(op.kind) for op in plan.ops]
        self._missing = defaultdict[int, int](lambda: plan.ranks)
        self.done = [env.event() for _ in plan.ops]
        self.normed = env.event()
        self.sent: list[Seen] = []
        combining = [kinds for kinds in METHODS.values() if kinds[-1] != GATHER_PARAMETERS]
        known = [kinds for kinds in combining if all(kind in network.costs for kind in kinds)]
        self._norm_s = min(sum(network.op(kind).seconds[0] for kind in kinds) for kinds in known)

    def issue(self, op: int) -> None:
        self._missing[op] -= 1
        if not self._missing[op]:
            self._env.process(self._carry(op))

    def _carry(self, op: int) -> Iterator[simpy.Event]:
        cost, bucket = self._costs[op], self._plan.ops[op].bucket
        yield self._env.timeout(cost.latency_s)
        if op:
            yield self.done[op - 1]
        began = self._env.now
        yield self._env.timeout(cost.transfer_s(self._plan.bucket_bytes(bucket)))
        name = self._plan.describe(bucket)
        self.sent.append(("send", name, began - cost.latency_s, self._env.now))
        self.done[op].succeed()

    def ask_for_norm(self) -> None:
        self._missing[-1] -= 1
        if not self._missing[-1]:
            self._env.process(self._sum_norms())

    def _sum_norms(self) -> Iterator[simpy.Event]:
        began = self._env.now
        yield self._env.timeout(self._norm_s)
        self.sent.append(("send", "norm of all gradients", began, self._env.now))
        self.normed.succeed()


class Rank:
    """One rank: its compute, its lane and its optimizer.

    Attributes:
        began: of each step; one more than there are steps.
        seen: of each step, what it computed and updated.
    """

    def __init__(
        self, world: World, factor: float, trace: Trace, plan: Plan, *, clip: bool
    ) -> None:
        self._world, self._env = world, world.env
        self._trace, self._plan, self._factor, self._clip = trace, plan, factor, clip
        self.began: list[float] = []
        self.seen: list[list[Seen]] = []
        self._ops_of: list[list[int]] = [[] for _ in plan.buckets]
        for index, op in enumerate(plan.ops):
            self._ops_of[op.bucket].append(index)
        self._of_layer: dict[str, list[int]] = defaultdict(list)
        for bucket, entry in enumerate(plan.buckets):
            for layer in entry.layers:
                self._of_layer[layer].append(bucket)

    def run(self, steps: int) -> Iterator[simpy.Event]:
        for step in range(steps):
            self.began.append(self._env.now)
            self.seen.append([])
            self._gradients = {layer.name: self._env.event() for layer in self._trace.layers}
            self._closed = self._env.event()
            sharded = any(op.kind == GATHER_PARAMETERS for op in self._plan.ops)
            together = self._world.step(step)
            self._env.process(self._optimizer(together, sharded))
            self._env.process(self._lane(together))
            for layer in reversed(self._trace.layers):
                yield from self._span("backward", layer.name, layer.bwd_us * 1e-6)
                self._gradients[layer.name].succeed()
            self._closed.succeed()
            for layer in self._trace.layers:
                buckets = self._of_layer[layer.name]
                if sharded:
                    yield self._env.all_of([together.done[self._ops_of[b][-1]] for b in buckets])
                elif buckets:
                    yield self._updated[layer.name]
                yield from self._span("forward", layer.name, layer.fwd_us * 1e-6)
        self.began.append(self._env.now)

    def _span(self, kind: str, name: str, usual_s: float) -> Iterator[simpy.Event]:
        start = self._env.now
        yield self._env.timeout(usual_s * self._factor)
        self.seen[-1].append((kind, name, start, self._env.now))

    def _lane(self, together: Together) -> Iterator[simpy.Event]:
        slots = simpy.Container(self._env, self._plan.window, init=self._plan.window)
        for index, op in enumerate(self._plan.ops):
            before = [i for i in self._ops_of[op.bucket] if i < index]
            if op.kind == GATHER_PARAMETERS:
                yield self._updated[str(op.bucket)]
            elif before:
                yield together.done[before[-1]]
            else:
                layers = self._plan.buckets[op.bucket].layers
                yield self._env.all_of([self._gradients[layer] for layer in layers])
            if index and self._plan.ops[index - 1].alone:
                yield together.done[index - 1]
            yield slots.get(1)
            together.issue(index)
            together.done[index].callbacks.append(lambda _: slots.put(1))

    def _optimizer(self, together: Together, sharded: bool) -> Iterator[simpy.Event]:
        """Updates one item after the other: layers, or this rank's parts of buckets."""
        per_byte = self._trace.update_us * 1e-6 / max(1, self._trace.total_bytes)
        names = [layer.name for layer in self._trace.layers]
        combined = [[i for i in ops if self._combines(i)][-1] for ops in self._ops_of]
        items: list[tuple[tuple[int, int], str, str, float, list[int]]] = []
        if sharded:
            for bucket, entry in enumerate(self._plan.buckets):
                need = (min(names.index(layer) for layer in entry.layers), bucket)
                part_s = self._plan.bucket_bytes(bucket) * per_byte / self._plan.ranks
                shown = self._plan.describe(bucket)
                items.append((need, str(bucket), shown, part_s, [combined[bucket]]))
        else:
            for index, layer in enumerate(self._trace.layers):
                after = [combined[bucket] for bucket in self._of_layer[layer.name]]
                if after:
                    whole_s = layer.bytes * per_byte
                    items.append(((index, 0), layer.name, layer.name, whole_s, after))
        self._updated = {key: self._env.event() for _, key, *_ in items}
        waiting: list[tuple[tuple[int, int], str, str, float]] = []
        news = simpy.Container(self._env)

        def await_item(item: tuple[int, int], key: str, shown: str, s: float, after: list[int]):
            yield self._env.all_of([together.done[i] for i in after])
            heapq.heappush(waiting, (item, key, shown, s))
            news.put(1)

        for item in items:
            self._env.process(await_item(*item))
        yield self._closed
        if self._clip:
            yield self._env.all_of([together.done[i] for i in combined])
            if sharded:
                together.ask_for_norm()
                yield together.normed
        for _ in items:
            yield news.get(1)
            yield self._after_all_else_now()
            _, key, shown, usual_s = heapq.heappop(waiting)
            yield from self._span("update", shown, usual_s)
            self._updated[key].succeed()

    def _combines(self, op: int) -> bool:
        return self._plan.ops[op].kind != GATHER_PARAMETERS

    def _after_all_else_now(self) -> simpy.Event:
        """Happens at this moment, but behind everything else that does."""
        event = self._env.event()
        event._ok, event._value = True, None
        self._env.schedule(event, priority=2)  # type: ignore[arg-type]
        return event


class World:
    """All ranks, for some steps.

    Args:
        factors: per rank, how many times as long it computes.
        steps: how many steps in a row.

    Attributes:
        ranks: each with what it did.
    """

    def __init__(
        self,
        trace: Trace,
        plan: Plan,
        network: Network,
        *,
        factors: Sequence[float],
        steps: int = 1,
        clip: bool = False,
    ) -> None:
        assert len(factors) == plan.ranks
        self.env = simpy.Environment()
        self._plan, self._network = plan, network
        self._steps: dict[int, Together] = {}
        self.ranks = [Rank(self, factor, trace, plan, clip=clip) for factor in factors]
        for rank in self.ranks:
            self.env.process(rank.run(steps))
        self.env.run()
        assert all(len(rank.began) == steps + 1 for rank in self.ranks), "somebody waits for ever"

    def step(self, number: int) -> Together:
        if number not in self._steps:
            self._steps[number] = Together(self.env, self._plan, self._network)
        return self._steps[number]

    def seen_by(self, rank: int, step: int) -> list[Seen]:
        """Everything in one step, in seconds since the rank's backward pass began, sorted."""
        zero = self.ranks[rank].began[step]
        seen = [*self.ranks[rank].seen[step], *self._steps[step].sent]
        return sorted((kind, name, start - zero, end - zero) for kind, name, start, end in seen)
