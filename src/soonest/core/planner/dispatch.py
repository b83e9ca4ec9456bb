"""The rule by which ops are put in order: of those that are ready, the most urgent goes first.

The transfers of a step are jobs on one machine, the network. Each has a *head*, before which its
gradients are not ready, and a *tail*, the computation that cannot begin without it: the problem
1 | r_i, q_i | Cmax. Schrage's heuristic for it sends, whenever the network gets free, what has the
longest tail among what is ready (J. Carlier, "The one-machine sequencing problem", European Journal
of Operational Research 11, 1982). See [Note: why the first layer goes first] in ``planner.py``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from soonest.core.simulator.lane import Lane


class Chain(NamedTuple):
    """The ops of one bucket, each of which follows the one before it.

    Args:
        ready_s: its head: when the first op may be issued.
        tail_s: its tail: what must still be computed once the last op has ended.
        part_s: how long a rank updates its part before an op gathers parameters.
        ops: of each op its latency and its transfer in seconds, and whether it gathers parameters.
        alone: whether no op is issued behind one of these before it is done.
    """

    ready_s: float
    tail_s: float
    part_s: float
    ops: Sequence[tuple[float, float, bool]]
    alone: bool = False


def dispatch(
    chains: Sequence[Chain], *, backward_s: float, window: int = 1
) -> list[tuple[int, int]]:
    """Puts the ops of all buckets in order by Schrage's heuristic.

    Args:
        chains: one per bucket. Without latencies the window does not matter.
        backward_s: length of the backward pass; no update starts before its end.
        window: how many ops may be in flight.

    Returns:
        Of each op its chain and its place in that; those that gather parameters are the last ones.
    """
    lane = Lane(window)
    at = [chain.ready_s for chain in chains]
    least_latency_s = min((op[0] for chain in chains for op in chain.ops), default=0.0)
    coming = [(ready_s, number, 0) for number, ready_s in enumerate(at)]
    heapq.heapify(coming)
    gathers: list[tuple[float, int, int]] = []
    ready: list[tuple[float, int, int]] = []
    order: list[tuple[int, int]] = []
    while coming or ready or gathers:
        if not (coming or ready):
            coming, gathers = gathers, coming
        # All that are ready by now can start their transfer at the same time.
        now = max(lane.free_s, lane.end_s - least_latency_s)
        if not ready:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            _, number, stage = heapq.heappop(coming)
            heapq.heappush(ready, (-chains[number].tail_s, number, stage))
        _, number, stage = heapq.heappop(ready)
        chain = chains[number]
        latency_s, transfer_s, _ = chain.ops[stage]
        lane.send([(number, latency_s, transfer_s, chain.alone)], at)
        order.append((number, stage))
        stage += 1
        if stage < len(chain.ops):
            later = coming
            if chain.ops[stage][2]:
                at[number] = max(at[number], backward_s) + chain.part_s
                later = gathers
            heapq.heappush(later, (at[number], number, stage))
    return order
