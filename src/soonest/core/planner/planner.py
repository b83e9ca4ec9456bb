"""Chooses what is sent in one piece, how, and in which order.

[Note: why the first layer goes first]

A backward pass makes gradients from the last layer to the first, and the next forward pass needs
parameters from the first layer to the last. So the first layer's gradient is the last to be ready
and the first to be needed: nothing hides its transfer. The last layer's has all the time between.
Whoever sends in the order of readiness, and waits for all before the update, hides transfers behind
the backward pass alone. Three layers, the last of which is as large as a fully connected one:

    time     0       4       8       12      16      20      24
    compute  |b3-----|b2-----|b1-----|               |f1-|f2-|f3-|     as DDP does: 26
    network          |3----------------------|2--|1--|

    compute  |b3-----|b2-----|b1-----|           |f1-|f2-|f3-|         the first layer first: 24
    network          |3----------------------|1--|2--|

    compute  |b3-----|b2-----|b1-----|   |f1-|f2-|   |f3-|             in pieces as well: 22
    network          |3a-|3b-|2--|3c-|1--|3d-|3e-|3f-|

*The lower bound.* The transfers of layers 1 to k all lie between the end of layer k's backward
computation and the start of its next forward computation, one after the other. So no step is
shorter than, for any k,

    transfers of layers 1..k  +  forward and backward computation of layers k and above

nor than the computation alone; here k = 3 gives 16 + 6 = 22. ``bounds.py`` proves it and adds what
latencies, updates and the window cost. It also says when a search may end.

*Why pieces.* A transfer that has begun is not interrupted, so a large one holds up whatever becomes
urgent behind it. Slices let the urgent pass. But every op has a latency and costs of its own, so
small parameters are fused; and both are only a choice of where flat buffers are cut into buckets.
``bucketing.py`` makes small ones in front, where nothing hides them, and lets sizes double from
there.

*Which order.* The network shall never idle while something is ready, and of what is ready the
bucket goes first that the next forward pass needs first: Schrage's rule, in ``dispatch.py``. It
does not look ahead: it may send a large bucket just before an urgent one is ready. So a descent
(``descent.py``) moves single ops while that shortens the simulated step.

*What is searched.* ``first_plan`` knows no times yet, and sends in the order of the backward pass.
``make_plan`` takes its buckets from sizes and the network alone, because with more than two ranks
they decide how sums are rounded, and searches the order only. ``best_plan`` searches buckets,
methods and order together: from several simple plans (``initial_orders.py``) it moves ops, moves
the borders of buckets, divides and joins them and changes their methods (``local_search.py``). It
ends as near to the bound as makes no difference, or when it has done a given amount of work; that
is counted, not timed, so that the same arguments give the same plan on any machine. Of several
windows the smallest is taken that is as good as any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from soonest.core.cost import Network
from soonest.core.plan import (
    ALIGN_BYTES,
    GATHER_PARAMETERS,
    METHODS,
    Bucket,
    Flat,
    Op,
    Plan,
    shards,
)
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.planner.bucketing import (
    FRONT_WORTH,
    PARTS,
    choices,
    flats_of,
    make_buckets,
    worthwhile_bytes,
)
from soonest.core.planner.initial_orders import simple_orders
from soonest.core.planner.local_search import search
from soonest.core.planner.ordering import first_needed, order
from soonest.core.planner.search_space import Space
from soonest.core.simulator.simulate import step_time_s
from soonest.core.trace import Trace

__all__ = [
    "PARTS",
    "backward_order",
    "best_plan",
    "choices",
    "make_buckets",
    "first_plan",
    "flats_of",
    "make_plan",
    "order",
]

WINDOWS = (1, 2, 3, 4)
"""How many ops in flight are worth trying: more use the network at once with nothing to gain."""
SLICES = 512
"""A search may cut a whole model into at most this many equal slices."""
MAX_WORK = 600_000
"""How many ops and layers a search may simulate: about half a second of one core."""
_AS_GOOD = 1e-4
"""A step may be longer by this fraction with a smaller window or with the urgent op alone: both
are safer, as ops in flight at once slow each other down in ways that no cost shows."""


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
        network: what each op costs.
        ranks: how many.
        window: how many ops may be in flight at once.
        methods, coarseness: see ``make_buckets``.
        pace: transfers take so many times as long as ``network`` says. Only the order depends on
            this.
    """
    buckets = make_buckets(flats, network, ranks=ranks, methods=methods, coarseness=coarseness)
    ops = order(trace, flats, buckets, network.slowed(pace), ranks=ranks, window=window)
    return Plan(ranks, tuple(flats), buckets, ops, window)


def best_plan(
    trace: Trace,
    flats: Sequence[Flat],
    network: Network,
    *,
    ranks: int,
    windows: Sequence[int] = WINDOWS,
    methods: Sequence[str] | None = None,
    slice_bytes: float | None = None,
    max_work: int = MAX_WORK,
) -> Plan:
    """The plan with the shortest simulated step that a bounded search finds.

    Cut points, methods, order and window are chosen together, from the times of the trace too. So
    with more than two ranks, where they decide how sums are rounded, runs are equal only if the
    plan is kept from one to the next. ``make_plan`` needs no such care.

    Small models come out optimal. Of large ones with several methods, or with a thousand tensors,
    ten times the work finds plans that are up to one or two percent faster.

    Args:
        trace: its layers have the names of ``Slot.layer``.
        flats: the flat buffers.
        network: what each op costs.
        ranks: how many.
        windows: how many ops may be in flight at once; the smallest that is as good as any.
        methods: to choose from; all but sharding ones if None.
        slice_bytes: between parameters it may cut anywhere, inside them at such distances. If None,
            as finely as may be worth it.
        max_work: how many ops and layers may be simulated; it bounds the time that this takes.

    Returns:
        The same plan for the same arguments.

    Raises:
        ValueError: a flat buffer holds a layer that the trace does not have, or windows are none.
    """
    if not windows or min(windows) < 1:
        raise ValueError(f"windows are {tuple(windows)}: give at least one, of one op or more")
    methods = choices(network) if methods is None else methods
    families = [[m for m in methods if shards(m) == sharded] for sharded in (False, True)]
    families = [family for family in families if family]
    found = [
        _searched(
            Space(
                trace,
                flats,
                network,
                ranks=ranks,
                methods=family,
                slice_bytes=slice_bytes or _slice_bytes(flats, network, family),
            ),
            windows,
            max_work // len(families),
        )
        for family in families
    ]
    return min(found, key=lambda plan: step_time_s(trace, plan, network))


def _searched(space: Space, windows: Sequence[int], max_work: int) -> Plan:
    """The best plan that a search finds in one space, with its window and its urgent ops chosen."""
    trace, network = space.trace, space.network
    widest = max(windows)
    bound_s = lower_bound_s(trace, network, methods=space.methods, window=widest)
    starts = simple_orders(space)
    sequence = search(space, starts, widest, bound_s=bound_s, max_work=max_work)
    near_s = space.timer.step_s(sequence, widest) * (1 + _AS_GOOD)
    window = min(w for w in windows if space.timer.step_s(sequence, w) <= near_s)
    plan = space.plan(sequence, window)
    alone = first_needed(trace, plan.buckets)
    careful = replace(plan, ops=tuple(replace(op, alone=op.bucket in alone) for op in plan.ops))
    return careful if step_time_s(trace, careful, network) <= near_s else plan


def _slice_bytes(flats: Sequence[Flat], network: Network, methods: Sequence[str]) -> float:
    total = sum(flat.numel * flat.itemsize for flat in flats)
    worth = worthwhile_bytes(network, methods) / FRONT_WORTH
    return max(total / SLICES, worth, ALIGN_BYTES)


def first_plan(
    flats: Sequence[Flat],
    network: Network,
    *,
    ranks: int,
    window: int = 2,
    methods: Sequence[str] | None = None,
) -> Plan:
    """The plan before the model was measured: the order in which a backward pass makes gradients.

    Flat buffers side by side are walked at the same relative pace. Parameters that are gathered
    behind an update come in the order in which a forward pass needs them.
    """
    buckets = make_buckets(flats, network, ranks=ranks, methods=methods)
    return Plan(ranks, tuple(flats), buckets, backward_order(flats, buckets), window)


def backward_order(flats: Sequence[Flat], buckets: Sequence[Bucket]) -> tuple[Op, ...]:
    """The ops in the order in which a backward pass makes gradients; see ``first_plan``."""
    backward = sorted(
        range(len(buckets)),
        key=lambda i: (-buckets[i].stop / flats[buckets[i].flat].numel, buckets[i].flat),
    )
    ops = [Op(i, kind) for i in backward for kind in METHODS[buckets[i].method]]
    ahead = [op for op in ops if op.kind != GATHER_PARAMETERS]
    behind = [op for op in reversed(ops) if op.kind == GATHER_PARAMETERS]
    return (*ahead, *behind)
