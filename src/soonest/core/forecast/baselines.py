"""How other ways of training spend a step, in the simulator's terms.

All wait for the last gradient before they update, and so before the next forward pass begins. That
is what soonest does not do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from soonest.core.cost import Network
from soonest.core.plan import Bucket, Flat, Op, Plan
from soonest.core.planner.ddp_buckets import CAP_BYTES, FIRST_BYTES, filled
from soonest.core.planner.planner import flats_of
from soonest.core.simulator.simulate import simulate
from soonest.core.timeline import Span, Timeline
from soonest.core.trace import Layer, Trace

MB = 1 << 20

SWEEP_MB: dict[str, tuple[float, ...]] = {
    "default": (FIRST_BYTES // MB, CAP_BYTES // MB),
    **{f"{mb} MB": (mb,) for mb in (1, 5, 50, 100, 400)},
}
"""Bucket sizes of ``DistributedDataParallel``: of the first bucket and of the others."""

GROUPS_MB = (0, 5, 25, 100)
"""Least sizes of what ``fully_shard`` is called on."""

IN_FLIGHT = 2
"""Buckets that a gloo group reduces at once. NCCL's stream has one more waiting likewise."""


def sequential(trace: Trace, network: Network, *, ranks: int) -> Timeline:
    """As in 2016: one all-reduce per layer after the backward pass, one at a time.

    Args:
        trace: the model.
        network: what each op costs.
        ranks: how many.

    Returns:
        One step.
    """
    # As if all gradients came at once at the end: the last layer in the order takes all the time.
    total_us = sum(layer.bwd_us for layer in trace.layers)
    late = [replace(layer, bwd_us=0.0) for layer in trace.layers]
    late[-1] = replace(late[-1], bwd_us=total_us)
    groups = [[i] for i in reversed(range(len(trace.layers))) if trace.layers[i].bytes]
    plan = _plan(trace, groups, ranks=ranks, window=1)
    sends = simulate(replace(trace, layers=tuple(late)), plan, network).of("send")
    return _after_all(trace, sends, "sequential")


def ddp(
    trace: Trace,
    network: Network,
    *,
    ranks: int,
    caps_mb: Sequence[float] = SWEEP_MB["default"],
    in_flight: int = IN_FLIGHT,
    title: str = "ddp",
) -> Timeline:
    """``DistributedDataParallel``: buckets as they get full, all waited for before the update.

    See S. Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
    VLDB 2020.

    Args:
        trace: the model.
        network: what each op costs.
        ranks: how many.
        caps_mb: sizes of the first bucket and of the following ones; the last one holds for
            all that follow. A bucket ends with the parameter that fills it, whole.
        in_flight: how many buckets may be on their way at once.
        title: of the timeline.

    Returns:
        One step.
    """
    plan = _plan(trace, ddp_buckets(trace, caps_mb), ranks=ranks, window=in_flight)
    return _after_all(trace, simulate(trace, plan, network).of("send"), title)


def ddp_tuned(trace: Trace, network: Network, *, ranks: int) -> Timeline:
    """``ddp`` with the best of the bucket sizes in ``SWEEP_MB``."""
    tried = (
        ddp(trace, network, ranks=ranks, caps_mb=caps, title="ddp-tuned")
        for caps in SWEEP_MB.values()
    )
    return min(tried, key=lambda timeline: timeline.step_s)


def fsdp2(
    trace: Trace,
    network: Network,
    *,
    ranks: int,
    parameters: Network | None = None,
    group_mb: float = 0.0,
    reshard: bool = False,
) -> Timeline:
    """``fully_shard`` on each group of layers.

    A group's parameters are gathered before its forward computation, and while that runs those of
    the next group are. Gradients are reduce-scattered as soon as a group has them. Then each rank
    updates its part. See Y. Zhao et al., "PyTorch FSDP", VLDB 2023.

    Args:
        trace: the model.
        network: what each op costs; of reduce-scatter and all-gather, or else half of an
            all-reduce is taken for either.
        ranks: how many.
        parameters: what gathering parameters costs; ``network`` if None.
        group_mb: neighbouring layers make a group until they have so many megabytes.
        reshard: give parameters away after the forward pass, and gather them again for the
            backward pass.

    Returns:
        One step.
    """
    groups = list(_groups(trace, group_mb * MB))
    sizes = [sum(layer.bytes for layer in group) for group in groups]
    wire, compute = _Wire(), _Compute()

    def gather(group: int, ready_s: float) -> float:
        costs = parameters or network
        return wire.send(groups[group], sizes[group], ready_s, costs, "all_gather_parameters")

    there_s = gather(len(groups) - 1, 0.0) if reshard else 0.0
    reduced_s = 0.0
    for number in reversed(range(len(groups))):
        start_s = max(compute.now_s, there_s)
        if reshard and number:
            there_s = gather(number - 1, start_s)
        compute.run("backward", reversed(groups[number]), start_s)
        size, now_s = sizes[number], compute.now_s
        reduced_s = wire.send(groups[number], size, now_s, network, "ring_reduce_scatter")
    began_s = max(compute.now_s, reduced_s)
    updated_s = began_s + trace.update_us * 1e-6 / ranks
    there_s = gather(0, updated_s)
    for number, group in enumerate(groups):
        start_s = max(compute.now_s, updated_s, there_s)
        if number + 1 < len(groups):
            there_s = gather(number + 1, start_s)
        compute.run("forward", group, start_s)
    return _timeline("fsdp2", compute, wire.spans, (began_s, updated_s))


def fsdp2_tuned(
    trace: Trace, network: Network, *, ranks: int, parameters: Network | None = None
) -> Timeline:
    """``fsdp2`` with the best of the groups in ``GROUPS_MB``, parameters kept for the backward."""
    tried = (
        fsdp2(trace, network, ranks=ranks, parameters=parameters, group_mb=mb) for mb in GROUPS_MB
    )
    return min(tried, key=lambda timeline: timeline.step_s)


def fsdp2_on_gloo(trace: Trace, network: Network, *, ranks: int) -> Timeline:
    """``fully_shard`` on each layer as it runs on CPUs.

    Nothing overlaps there, and gloo's reduce-scatter is an all-reduce inside.

    Args:
        trace: the model.
        network: what each op costs.
        ranks: how many.

    Returns:
        One step.
    """
    wire, compute = _Wire(), _Compute()
    ready_s = 0.0
    for layer in reversed(trace.layers):
        compute.run("backward", [layer], ready_s)
        ready_s = wire.send([layer], layer.bytes, compute.now_s, network, "all_reduce")
    began_s = max(compute.now_s, ready_s)
    updated_s = ready_s = began_s + trace.update_us * 1e-6 / ranks
    for layer in trace.layers:
        ready_s = max(ready_s, compute.now_s)
        ready_s = wire.send([layer], layer.bytes, ready_s, network, "all_gather_parameters")
        compute.run("forward", [layer], ready_s)
    return _timeline("fsdp2", compute, wire.spans, (began_s, updated_s))


def ddp_buckets(trace: Trace, caps_mb: Sequence[float]) -> list[list[int]]:
    """The layers of each bucket, as indices: the last layer first, as its gradient is."""
    sending = [i for i in reversed(range(len(trace.layers))) if trace.layers[i].bytes]
    counts = filled((trace.layers[i].bytes for i in sending), [mb * MB for mb in caps_mb])
    return [sending[a:b] for a, b in pairwise(accumulate(counts, initial=0))]


def _plan(trace: Trace, groups: Sequence[Sequence[int]], *, ranks: int, window: int) -> Plan:
    """One all-reduce for each group of layers, in the order of groups; these run from the back."""
    flats: tuple[Flat, ...] = flats_of(trace)
    start_of = {slot.layer: slot.start for slot in flats[0].slots}
    names = [[trace.layers[i].name for i in sorted(group)] for group in reversed(groups)]
    starts = [start_of[layers[0]] for layers in names]
    buckets = tuple(
        Bucket(0, start, stop, "allreduce", tuple(layers))
        for (start, stop), layers in zip(pairwise([*starts, flats[0].numel]), names, strict=True)
    )
    ops = tuple(Op(index, "all_reduce") for index in reversed(range(len(buckets))))
    return Plan(ranks, flats, buckets, ops, window)


def _after_all(trace: Trace, sends: Sequence[Span], title: str) -> Timeline:
    """A step in which everything sent is waited for, then updated, then used."""
    compute = _Compute()
    compute.run("backward", reversed(trace.layers), 0.0)
    sent_s = max([compute.now_s, *(span.end_s for span in sends)])
    updated_s = sent_s + trace.update_us * 1e-6
    compute.run("forward", trace.layers, updated_s)
    return _timeline(title, compute, sends, (sent_s, updated_s))


def _timeline(
    title: str, compute: _Compute, sends: Sequence[Span], update: tuple[float, float]
) -> Timeline:
    updates = [Span("update", "update", "all", *update)] if update[1] > update[0] else []
    return Timeline(title, compute.now_s, (*compute.spans, *sends, *updates))


def _groups(trace: Trace, least_bytes: float) -> Iterable[list[Layer]]:
    """Neighbouring layers of at least so many bytes; every group but for the last has some."""
    group: list[Layer] = []
    for layer in trace.layers:
        group.append(layer)
        if sum(member.bytes for member in group) >= max(1.0, least_bytes):
            yield group
            group = []
    if group:
        yield group


class _Compute:
    """The computation of a step; where it stands still it waits."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.spans: list[Span] = []

    def run(self, kind: str, layers: Iterable[Layer], start_s: float) -> None:
        for layer in layers:
            if start_s > self.now_s:
                self.spans.append(Span("compute", "wait", layer.name, self.now_s, start_s))
                self.now_s = start_s
            forward = kind == "forward"
            end_s = self.now_s + (layer.fwd_us if forward else layer.bwd_us) * 1e-6
            done = "forward" if forward else "backward"
            self.spans.append(Span("compute", done, layer.name, self.now_s, end_s))
            self.now_s = end_s


class _Wire:
    """Ops one behind the other, the latency of one hidden behind the transfer before it."""

    def __init__(self) -> None:
        self._free_s = 0.0
        self.spans: list[Span] = []

    def send(
        self, layers: Sequence[Layer], size: int, ready_s: float, network: Network, kind: str
    ) -> float:
        """Issues an op; returns when it is done."""
        if not size:
            return ready_s
        known = kind in network.costs
        cost, share = network.op(kind if known else "all_reduce"), 1.0 if known else 0.5
        latency_s = share * cost.latency_at(size)
        start_s = max(ready_s + latency_s, self._free_s)
        self._free_s = start_s + share * cost.transfer_s(size)
        name = ", ".join(layer.name for layer in layers if layer.bytes)
        self.spans.append(Span("network", "send", name, start_s - latency_s, self._free_s))
        return self._free_s
