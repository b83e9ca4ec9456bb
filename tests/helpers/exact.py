"""The shortest step of all plans of a small model, by constraint programming, and the models."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ortools.sat.python import cp_model

from soonest.core.cost import Cost, Network
from soonest.core.plan import GATHER_PARAMETERS, METHODS, Bucket, Flat, Op, Plan
from soonest.core.planner.bucketing import cut_points
from soonest.core.trace import Layer, Trace

UNIT_BYTES = 64
"""Sizes are multiples of this and times of a microsecond, so that all is exact in integers."""
SECONDS = 120
"""No model here needs a hundredth of it: it only keeps a defect from hanging."""


@dataclass(frozen=True)
class Model:
    """A small model on a network, and what a plan may choose.

    Args:
        regime: what is special about it.
        slice_bytes: distance of the cut points inside a parameter; between them it may always be
            cut.
    """

    regime: str
    trace: Trace
    flats: tuple[Flat, ...]
    network: Network
    methods: tuple[str, ...]
    windows: tuple[int, ...]
    ranks: int = 4
    slice_bytes: float = 1e9


@dataclass(frozen=True)
class _Group:
    """Neighbouring atoms that may become a bucket, by one of the methods."""

    bucket: Bucket
    atoms: range
    present: cp_model.BoolVarT
    ops: list["_Op"]


@dataclass(frozen=True)
class _Op:
    group: int
    kind: str
    issue: cp_model.IntVar
    start: cp_model.IntVar
    end: cp_model.IntVar


def shortest_step(model: Model) -> tuple[float, Plan]:
    """The shortest step of all plans, in seconds, and a plan that takes as long.

    The plans differ in which groups of neighbouring atoms (what lies between two cut points) become
    buckets, in the method of each, in the order of all ops, and in the window. An op is issued when
    its gradients are ready, not before the one in front of it, and while fewer than the window are
    in flight; then its latency passes; then it transfers, one at a time in that order. Nothing
    takes time to update but the parts of ``shard``.
    """
    trace, network = model.trace, model.network
    cp = cp_model.CpModel()
    ready = dict(zip((x.name for x in trace.layers), map(_us, trace.ready_s()), strict=True))
    tail = dict(zip((x.name for x in trace.layers), map(_us, trace.tail_s()), strict=True))
    backward = _us(trace.backward_s)
    groups: list[_Group] = []
    carriers: dict[str, list[tuple[cp_model.BoolVarT, cp_model.IntVar]]] = {
        layer.name: [] for layer in trace.layers
    }
    horizon = _horizon(model)
    step = cp.new_int_var(_us(trace.forward_s) + backward, horizon, "step")
    for number, flat in enumerate(model.flats):
        points = cut_points(flat, model.slice_bytes)
        cover: list[list[cp_model.BoolVarT]] = [[] for _ in points[1:]]
        for first, last in combinations(range(len(points)), 2):
            start, stop = points[first], points[last]
            layers = tuple(
                dict.fromkeys(
                    slot.layer
                    for slot in flat.slots
                    if slot.start < stop and start <= slot.count_at
                )
            )
            size = (stop - start) * flat.itemsize
            for method in model.methods:
                name = f"{number}:{first}-{last} {method}"
                present = cp.new_bool_var(name)
                ops: list[_Op] = []
                for kind in METHODS[method]:
                    cost = network.op(kind)
                    latency, transfer = _us(cost.latency_s), _us(cost.transfer_s(size))
                    at = [cp.new_int_var(0, horizon, f"{name} {kind}") for _ in range(3)]
                    op = _Op(len(groups), kind, *at)
                    cp.add(op.start >= op.issue + latency)
                    cp.add(op.end == op.start + transfer)
                    if kind == GATHER_PARAMETERS:
                        cp.add(op.issue >= backward)
                        cp.add(op.issue >= ops[-1].end)
                    elif ops:
                        cp.add(op.issue >= ops[-1].end)
                    else:
                        cp.add(op.issue >= max(ready[layer] for layer in layers))
                    ops.append(op)
                landed = ops[-1].end + max(tail[layer] for layer in layers)
                cp.add(step >= landed).only_enforce_if(present)
                for layer in layers:
                    carriers[layer].append((present, ops[-1].end))
                bucket = Bucket(number, start, stop, method, layers)
                groups.append(_Group(bucket, range(first, last), present, ops))
                for atom in range(first, last):
                    cover[atom].append(present)
        for choices in cover:
            cp.add_exactly_one(choices)
    window = cp.new_int_var_from_domain(cp_model.Domain.from_values(model.windows), "window")
    _in_order(cp, groups, window, horizon)
    if trace.update_us:
        _updated(cp, model, carriers, step, horizon)
    cp.minimize(step)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_time_in_seconds = SECONDS
    status = solver.solve(cp)
    assert status == cp_model.OPTIMAL, solver.status_name(status)
    chosen = [group for group in groups if solver.boolean_value(group.present)]
    place = {id(group): i for i, group in enumerate(chosen)}
    ops = sorted(
        (solver.value(op.start), place[id(group)], op.kind) for group in chosen for op in group.ops
    )
    plan = Plan(
        model.ranks,
        model.flats,
        tuple(group.bucket for group in chosen),
        tuple(Op(bucket, kind) for _, bucket, kind in ops),
        solver.value(window),
    )
    return round(solver.objective_value) * 1e-6, plan


def _in_order(
    cp: cp_model.CpModel, groups: list[_Group], window: cp_model.IntVar, horizon: int
) -> None:
    """All ops that are there have one order, in which they are issued and transfer."""
    transfers: list[cp_model.IntervalVar] = []
    flights: list[cp_model.IntervalVar] = []
    ops = [op for group in groups for op in group.ops]
    for op in ops:
        present = groups[op.group].present
        for intervals, begin in ((transfers, op.start), (flights, op.issue)):
            length = cp.new_int_var(0, horizon, "")
            intervals.append(cp.new_optional_interval_var(begin, length, op.end, present, ""))
    cp.add_no_overlap(transfers)
    cp.add_cumulative(flights, [1] * len(flights), window)
    for a, b in combinations(ops, 2):
        one, other = groups[a.group], groups[b.group]
        if one is other:
            continue  # They follow each other anyway.
        if one.bucket.flat == other.bucket.flat and set(one.atoms) & set(other.atoms):
            continue  # Never both.
        both = [one.present, other.present]
        before = cp.new_bool_var("")
        for literal, x, y in ((before, a, b), (before.negated(), b, a)):
            cp.add(x.end <= y.start).only_enforce_if(literal, *both)
            cp.add(x.issue <= y.issue).only_enforce_if(literal, *both)
        if (a.kind == GATHER_PARAMETERS) != (b.kind == GATHER_PARAMETERS):
            cp.add_bool_or(before if b.kind == GATHER_PARAMETERS else before.negated())


def _updated(
    cp: cp_model.CpModel,
    model: Model,
    carriers: Mapping[str, Sequence[tuple[cp_model.BoolVarT, cp_model.IntVar]]],
    step: cp_model.IntVar,
    horizon: int,
) -> None:
    """Layers are updated after the backward pass, one at a time, whenever there is one to update.

    The one needed first goes first. ``carriers`` has per layer the groups with it and their ends.
    """
    trace = model.trace
    backward, tails = _us(trace.backward_s), map(_us, trace.tail_s())
    there: list[cp_model.IntVar] = []
    starts: list[cp_model.IntVar] = []
    ends: list[cp_model.IntVar] = []
    intervals: list[cp_model.IntervalVar] = []
    for layer, tail in zip(trace.layers, tails, strict=True):
        if not layer.bytes:
            continue
        landed, can, start = (cp.new_int_var(0, horizon, "") for _ in range(3))
        lasts: list[cp_model.BoolVarT] = []
        for present, end in carriers[layer.name]:
            last = cp.new_bool_var("")
            cp.add_implication(last, present)
            cp.add(landed == end).only_enforce_if(last)
            cp.add(landed >= end).only_enforce_if(present)
            lasts.append(last)
        cp.add_bool_or(lasts)
        cp.add_max_equality(can, [landed, backward])
        length = trace.update_us * layer.bytes / trace.total_bytes
        assert abs(length - round(length)) < 1e-6
        end = cp.new_int_var(0, horizon, "")
        intervals.append(cp.new_interval_var(start, round(length), end, ""))
        cp.add(start >= can)
        cp.add(step >= end + tail)
        there.append(can)
        starts.append(start)
        ends.append(end)
    cp.add_no_overlap(intervals)
    for i, start in enumerate(starts):
        at_once = cp.new_bool_var("")
        cp.add(start == there[i]).only_enforce_if(at_once)
        ways = [at_once]
        for j, end in enumerate(ends):
            if j != i:
                behind = cp.new_bool_var("")
                cp.add(start == end).only_enforce_if(behind)
                ways.append(behind)
            if j < i:  # Needed sooner: updated before, or not there yet.
                before = cp.new_bool_var("")
                cp.add(starts[j] < start).only_enforce_if(before)
                cp.add(there[j] > start).only_enforce_if(before.negated())
        cp.add_bool_or(ways)


def _us(seconds: float) -> int:
    micro = round(seconds * 1e6)
    assert abs(micro - seconds * 1e6) < 1e-4, "times are whole microseconds"
    return micro


def _horizon(model: Model) -> int:
    """No plan takes longer: everything one after the other, by the slowest way."""
    total = sum(flat.numel * flat.itemsize for flat in model.flats)
    atoms = sum(len(cut_points(flat, model.slice_bytes)) for flat in model.flats)
    kinds = [kind for method in model.methods for kind in METHODS[method]]
    costs = [model.network.op(kind) for kind in kinds]
    seconds = sum(cost.transfer_s(total) + atoms * cost.latency_s for cost in costs)
    trace = model.trace
    return int(1e6 * (seconds + trace.forward_s + trace.backward_s) + 2 * trace.update_us) + 1


REGIMES = {
    "near": "synchronizing takes about as long as computing",
    "slow network": "synchronizing takes four times as long",
    "fast network": "synchronizing takes a third of it",
    "late": "latencies are longer than most transfers",
    "giant first": "a giant embedding, used first, is ready last",
    "tied": "weights used first and last: ready last, needed first, long before and behind",
    "out of order": "gradients side by side in a buffer are not ready side by side",
    "two buffers": "layers lie in one of two buffers",
    "sliced": "large parameters may be cut, too",
    "methods": "a method with a low latency and one with a high rate",
    "two hops": "a method of three ops, one after the other",
    "sharded": "parameters are shared after the backward pass, behind all gradients",
    "updates": "updates take time, too",
}


def draw_model(regime: str, seed: int) -> Model:
    """A random model of a regime; always the same one for the same seed."""
    draw = random.Random(f"{regime} {seed}")
    count = draw.randint(3, 8)
    if regime in ("two hops", "sharded", "methods", "sliced", "updates"):
        count = draw.randint(3, 5)
    units = [draw.randint(1, 30) for _ in range(count)]
    times = [(draw.randint(0, 20), draw.randint(0, 40)) for _ in range(count)]
    if regime == "giant first":
        units[0] = draw.randint(60, 200)
        times[0] = (draw.randint(0, 3), draw.randint(0, 3))
    if regime == "tied":  # Of the first layer and the last, which has nothing of its own.
        units[0], units[-1] = draw.randint(30, 60), 0
        times[-1] = (draw.randint(10, 40), draw.randint(10, 60))
    computes = max(1, sum(a + b for a, b in times))
    ratio = {"slow network": 4.0, "fast network": 0.3}.get(regime, draw.choice([0.7, 1.0, 1.5]))
    per_unit = max(1, round(ratio * computes / sum(units)))
    latency = draw.choice([0, 1, 5, 20]) if regime != "late" else draw.randint(10, 60)
    update_us = 0  # for a unit
    names = [f"l{i}" for i in range(count)]
    sizes = [(n, n, 16 * u - 1) for n, u in zip(names, units, strict=True) if u]
    ranks = 4
    if regime == "updates":
        update_us = draw.choice([1, 2, 3])
    if regime == "out of order":
        draw.shuffle(sizes)
    flats = (Flat.lay_out("float32", 4, sizes),)
    if regime == "two buffers":
        here = [draw.random() < 0.6 for _ in sizes]
        halves = [
            [size for size, one in zip(sizes, here, strict=True) if one == half]
            for half in (True, False)
        ]
        flats = tuple(Flat.lay_out("float32", 4, half) for half in halves if half)
    layers = tuple(
        Layer(n, u * UNIT_BYTES, float(f), float(b))
        for n, u, (f, b) in zip(names, units, times, strict=True)
    )
    trace = Trace(regime, layers, float(update_us * sum(units)))

    def cost(late: int, per: int) -> Cost:
        return Cost.linear(late * 1e-6, UNIT_BYTES * 1e6 / per)

    costs = {"all_reduce": cost(latency, per_unit)}
    methods = ("allreduce",)
    if regime == "methods":
        costs["exchange"] = cost(draw.randint(0, 5), per_unit + draw.randint(1, 4))
        costs["all_reduce"] = cost(draw.randint(10, 40), per_unit)
        methods = ("allreduce", "exchange")
    if regime == "two hops":
        for kind in METHODS["hierarchical"]:
            costs[kind] = cost(draw.randint(0, 10), max(1, draw.randint(1, per_unit)))
        methods = ("allreduce", "hierarchical")
    if regime == "sharded":
        costs["reduce_scatter"] = cost(draw.randint(0, 10), max(1, per_unit // 2))
        costs["all_gather_parameters"] = cost(draw.randint(0, 10), max(1, per_unit // 2))
        methods = ("shard_direct",)
    slice_bytes = 1e9
    if regime == "sliced":
        largest = max(units)
        slice_bytes = UNIT_BYTES * max(1, largest // 3)
    top = draw.randint(1, 3)
    windows = tuple(range(1, top + 1)) if draw.random() < 0.5 else (top,)
    return Model(regime, trace, flats, Network(costs), methods, windows, ranks, slice_bytes)
