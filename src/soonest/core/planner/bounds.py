"""A lower bound of the step time, which no schedule can beat.

What it means for plans is in [Note: why the first layer goes first] in ``planner.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from soonest.core.cost import Network
from soonest.core.plan import GATHER_PARAMETERS, METHODS, shards
from soonest.core.trace import Trace

_WEIGHTS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Weights of the transfers in ``_Mixture``: each gives a valid bound, and the largest counts."""


def lower_bound_s(
    trace: Trace,
    network: Network,
    *,
    methods: Sequence[str] | None = None,
    window: int | None = None,
) -> float:
    """Seconds that no step is shorter than, whatever is cut, fused or reordered.

    A step runs from the start of a backward pass to the end of the forward pass after it, so it
    takes at least F + B, the computation alone. Layer i has a *head* r_i = sum of b_j over j >= i
    before its gradient is ready, a *body* p_i of transfer on the one network, and a *tail*
    q_i = sum of f_j over j >= i of forward computation that needs its parameters. This is the
    one-machine problem 1 | r_i, q_i, pmtn | Cmax. Any set S of layers needs

        min r over S  +  sum of p over S  +  min q over S

    because its transfers start after the first of its gradients is ready, cannot overlap, and the
    layer that is there last still has its tail before it. The maximum over all S is attained by
    Jackson's preemptive schedule, so no better bound exists for preemptive transfers (J. Carlier,
    "The one-machine sequencing problem", European Journal of Operational Research 11, 1982).

    Here heads and tails agree: both fall from layer to layer. If k is the last layer in S, both
    minima belong to k, and S = {1..k} has the largest sum. So the maximum over all sets is

        max over k of  C(1..k) + sum over i >= k of (f_i + b_i)

    What more is known of every schedule:

    - The first transfer of a set starts a latency after its gradients are ready at the earliest;
      all others may hide theirs. With a *window* w, an op takes one of w places in flight for its
      latency and its transfer, so a set takes at least a w-th of their sum. It takes at least any
      mixture of that and of its transfers.
    - An op costs something however small it is, so C counts the least cost per byte that any size
      up to the whole model has, or one op's at no size and the least that more bytes cost.
    - One bucket for all of 1..k is ready with layer 1 and waited for by it, so it hides nothing.
      More than one bucket have the costs and latencies of two.
    - Updates start after the backward pass, as ``optimizer.step()`` is called then, run one after
      the other, and are over for layers 1..k before the forward pass of layer k starts. With u_i =
      update of layer i that is B + sum over i <= k of u_i + q_k; and what comes last of a set must
      still be updated, so u_i + q_i counts for q_i.
    - Where plans shard, no rank updates a whole layer. Parameters are gathered after the backward
      pass and after all gradients: layers 1..k are there after max(B + latency, all gradients
      reduced) and the gathering of their own.

    Args:
        trace: the model; the time of an update is divided by bytes.
        network: what each op costs.
        methods: that plans may use; all whose costs are known if None.
        window: how many ops may be in flight; any number if None.

    Returns:
        Seconds.
    """
    methods = network.methods if methods is None else methods
    bounds = [
        bound(trace, network, [m for m in methods if shards(m) == sharded], window)
        for bound, sharded in ((_unsharded_s, False), (_sharded_s, True))
        if any(shards(m) == sharded for m in methods)
    ]
    return max(trace.forward_s + trace.backward_s, min(bounds))


def _unsharded_s(
    trace: Trace, network: Network, methods: Sequence[str], window: int | None
) -> float:
    """The bound for plans that do not shard: every rank updates every layer."""
    kinds = [METHODS[method] for method in methods]
    latency_s = min(network.op(first).latency_s for first, *_ in kinds)
    weights = _WEIGHTS if window else (1.0,)
    mixtures = [_Mixture(network, kinds, trace.total_bytes, x, window) for x in weights]
    update_per_byte = trace.update_us * 1e-6 / max(1, trace.total_bytes)
    bound, size, last_s, after_s = 0.0, 0, math.inf, 0.0
    first_s: float | None = None
    backward_s = trace.backward_s
    for layer, head, tail in zip(trace.layers, trace.ready_s(), trace.tail_s(), strict=True):
        if not layer.bytes:
            continue  # It neither sends nor waits.
        size += layer.bytes
        first_s = head if first_s is None else first_s
        last_s = min(last_s, layer.bytes * update_per_byte + tail)
        after_s = max(after_s, size * update_per_byte + tail)
        reduced = first_s + min(network.cost_s(method, size) for method in methods)
        one = max(reduced, backward_s) + after_s
        several = head + last_s + max(mixture.least_s(size, 2, latency_s) for mixture in mixtures)
        bound = max(bound, min(one, several), backward_s + after_s)
    return bound


def _sharded_s(trace: Trace, network: Network, methods: Sequence[str], window: int | None) -> float:
    """The bound for plans that shard: ranks update parts, and then gather the parameters."""
    del window  # The transfers of both ops are so many that latencies matter little.
    reducing = [METHODS[method][:-1] for method in methods]
    total, gathering = trace.total_bytes, [(GATHER_PARAMETERS,)]
    latency_s = min(network.op(first).latency_s for first, *_ in reducing)
    reduce, gather = (_Mixture(network, k, total, 1.0, None) for k in (reducing, gathering))
    gather_latency_s = network.op(GATHER_PARAMETERS).latency_s
    layers = [
        entry
        for entry in zip(trace.layers, trace.ready_s(), trace.tail_s(), strict=True)
        if entry[0].bytes
    ]
    sizes: list[int] = []
    for layer, _, _ in layers:
        sizes.append(layer.bytes + (sizes[-1] if sizes else 0))
    reduced = max(
        (
            head + reduce.least_s(size, 1, latency_s)
            for size, (_, head, _) in zip(sizes, layers, strict=True)
        ),
        default=0.0,
    )
    start = max(reduced, trace.backward_s + gather_latency_s)
    return max(
        (
            start + gather.least_s(size, 1, 0.0) + tail
            for size, (_, _, tail) in zip(sizes, layers, strict=True)
        ),
        default=0.0,
    )


class _Mixture:
    """The least that sending takes, if transfers and places in flight count in some proportion.

    Args:
        network: what each op costs.
        kinds: the ops of each method to choose from.
        most_bytes: that a bucket may have.
        weight: of the transfers, 0 to 1.
        window: how many may be in flight; any number if None.
    """

    def __init__(
        self,
        network: Network,
        kinds: Sequence[Sequence[str]],
        most_bytes: int,
        weight: float,
        window: int | None,
    ) -> None:
        self._weight = weight
        places = (1 - weight) / window if window else 0.0

        def cost_s(ops: Sequence[str], size: float) -> float:
            costs = [network.op(kind) for kind in ops]
            return sum(weight * c.transfer_s(size) + places * c.alone_s(size) for c in costs)

        # Between these sizes costs are linear, so the least per byte is at one of them.
        sizes = {s for ops in kinds for k in ops for s in network.op(k).sizes_bytes}
        sizes = [s for s in (*sizes, float(most_bytes)) if 0 < s <= most_bytes]
        self._per_byte = min((cost_s(ops, s) / s for ops in kinds for s in sizes), default=0.0)
        self._empty_s = min(cost_s(ops, 0.0) for ops in kinds)
        self._one_more = min(
            (weight + places) * sum(network.op(kind).s_per_byte for kind in ops) for ops in kinds
        )

    def least_s(self, size: int, buckets: int, latency_s: float) -> float:
        """From when the first op of a set may be issued to the end of the last one.

        Args:
            size: bytes of the set.
            buckets: that carry it at least.
            latency_s: of the first op.
        """
        fixed = buckets * self._empty_s + size * self._one_more
        return self._weight * latency_s + max(size * self._per_byte, fixed)
