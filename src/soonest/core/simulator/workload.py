"""What one step under a plan has to do, in numbers, to be run under any order of its ops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from soonest.core.cost import Network
from soonest.core.plan import GATHER_PARAMETERS, METHODS, Bucket, Flat, Op, shards
from soonest.core.trace import Trace


class Job(NamedTuple):
    """One op of one bucket, in numbers.

    Args:
        bucket: index of the bucket.
        kind: of the op.
        latency_s: passes while others transfer.
        transfer_s: how long it keeps the network to itself.
    """

    bucket: int
    kind: str
    latency_s: float
    transfer_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace, its buckets and a network in numbers, to be run under any order of the ops.

    Args:
        jobs: the ops of all buckets, by bucket, and of one bucket in their order.
        ready_s: per bucket, when the gradients of all layers that it carries are ready.
        tail_s: per bucket, the forward computation that cannot start before it is there.
        layers_of: per bucket, the indices of the layers that it carries.
        part_s: per bucket, how long a rank takes to update its part, where it is sharded.
        backward_s: length of the backward pass.
        forward_s, update_s: per layer.
        alone: buckets behind whose ops no other is issued before they are done.
        gradient_s: per layer, when its gradient is ready.
        sharded: whether each rank updates only its part of every bucket.
        reducing: how many ops reduce gradients; those behind them gather parameters.
        by_need: what is updated as one, in the order in which the forward pass needs it: buckets
            where each rank updates its parts of them, and otherwise the layers that are sent.
        norm_s: if gradients are clipped, how long the op takes that sums the norms of the ranks'
            parts, where there are parts; None without clipping.
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
    gradient_s: list[float]
    sharded: bool
    reducing: int
    by_need: list[int]
    norm_s: float | None

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
        clip: bool = False,
    ) -> Workload:
        """Puts a plan into numbers.

        Args:
            trace: the model.
            flats, buckets: of the plan.
            network: what each op costs.
            ranks: how many.
            alone: see above.
            clip: whether gradients are clipped by the norm of all of them.

        Raises:
            ValueError: a bucket carries a layer that the trace does not have.
        """
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
        sharded = any(shards(bucket.method) for bucket in buckets)
        first = [min(layers, default=0) for layers in layers_of]
        if sharded:
            by_need = sorted(range(len(first)), key=first.__getitem__)
        else:
            by_need = sorted({layer for layers in layers_of for layer in layers})
        jobs: list[Job] = []
        for bucket, size in enumerate(sizes):
            for kind in METHODS[buckets[bucket].method]:
                cost = network.op(kind)
                jobs.append(Job(bucket, kind, cost.latency_at(size), cost.transfer_s(size)))
        return cls(
            jobs=jobs,
            # Heads and tails fall from layer to layer, so those of the first are the largest.
            ready_s=[ready[layer] for layer in first],
            tail_s=[tail[layer] for layer in first],
            layers_of=layers_of,
            part_s=[size * update_per_byte / ranks for size in sizes],
            backward_s=ready[0],
            forward_s=[layer.fwd_us * 1e-6 for layer in trace.layers],
            update_s=[layer.bytes * update_per_byte for layer in trace.layers],
            alone=frozenset(alone),
            gradient_s=ready,
            sharded=sharded,
            reducing=sum(job.kind != GATHER_PARAMETERS for job in jobs),
            by_need=by_need,
            norm_s=_number_s(network) if clip else None,
        )

    def sequence(self, ops: Iterable[Op]) -> list[int]:
        """The indices of the jobs that the ops of a plan stand for."""
        index = {(job.bucket, job.kind): i for i, job in enumerate(self.jobs)}
        return [index[op.bucket, op.kind] for op in ops]

    def by_layer(self, at_s: Sequence[float]) -> list[float]:
        """Per layer, the last time of the buckets that carry it; zero if none does."""
        last = [0.0] * len(self.forward_s)
        for layers, at in zip(self.layers_of, at_s, strict=True):
            for layer in layers:
                if at > last[layer]:
                    last[layer] = at
        return last


def _number_s(network: Network) -> float:
    """Seconds to reduce a single number over all ranks, by the method that is cheapest for it."""
    return min(network.cost_s(m, 0.0) for m in network.methods if not shards(m))
