"""Traces, timelines and the network's pace from the records of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.planner.report import busy_s
from soonest.core.timeline import Span, Timeline, covered_s
from soonest.core.trace import Layer, Trace
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.timing.step_record import NEVER, Record

_ENOUGH_OPS = 4
"""Ops behind the backward pass that suffice to leave out those in it."""


def trace_of(
    backward: Record,
    forward: Record,
    params: Sequence[FlatParam],
    *,
    model: str,
    update_s: float = 0.0,
) -> Trace:
    """The layers of a model as measured; waiting for the network is left out.

    Args:
        backward: the record whose backward pass to take.
        forward: the record whose forward pass to take; its order becomes that of the trace.
        params: the model's parameters.
        model: a name for the trace.
        update_s: time to update all parameters, seconds.

    Returns:
        One layer for each module that owns parameters.
    """
    backward.settle()
    forward.settle()
    layers = _layers(forward, params)
    names = list(layers)
    size = [sum(params[m].parameter.nbytes for m in layers[name]) for name in names]
    return Trace(
        model,
        tuple(
            Layer(name, size[i], fwd_us=fwd * 1e6, bwd_us=bwd * 1e6)
            for i, (name, (_, fwd), (_, bwd)) in enumerate(
                zip(
                    names,
                    _forward_spans(forward, [layers[name] for name in names]),
                    _backward_spans(backward, [layers[name] for name in names]),
                    strict=True,
                )
            )
        ),
        update_s * 1e6,
    )


def typical(traces: Sequence[Trace]) -> Trace:
    """The layer-wise median of several traces of the same model."""
    first = traces[0]
    times = [{layer.name: layer for layer in trace.layers} for trace in traces]
    layers = tuple(
        Layer(
            layer.name,
            layer.bytes,
            median(t[layer.name].fwd_us for t in times),
            median(t[layer.name].bwd_us for t in times),
        )
        for layer in first.layers
    )
    return Trace(first.model, layers, median(trace.update_us for trace in traces))


def updating_s(record: Record) -> float:
    """Seconds that went into updates, of all buckets together."""
    record.settle()
    spans = zip(record.update_start, record.update_end, strict=True)
    return sum(end - start for start, end in spans if not math.isnan(start + end))


def pace_of(record: Record, plan: Plan, network: Network) -> float | None:
    """The factor by which ops take longer than ``network`` says; None if none was sent.

    Ops in flight at the same time share the network, so only all of them together show its pace.
    Those of a backward pass may wait for a slower rank's gradients, so if there are enough others,
    they do not count.
    """
    record.settle()
    spans = [
        (start, end, network.op(op.kind).transfer_s(plan.bucket_bytes(op.bucket)))
        for op, start, end in zip(plan.ops, record.op_start, record.op_end, strict=True)
        if not math.isnan(start + end)
    ]
    later = [span for span in spans if span[0] >= record.backward_ended]
    chosen = later if len(later) >= _ENOUGH_OPS else spans
    expected_s = sum(transfer_s for *_, transfer_s in chosen)
    return covered_s((start, end) for start, end, _ in chosen) / expected_s if expected_s else None


class Measured(NamedTuple):
    """Times of a plan's ops over some steps, as medians.

    Args:
        busy_s: per bucket, how long it kept the network busy; None before any step.
        pace: see ``pace_of``.
    """

    busy_s: list[float | None]
    pace: float


def measured(records: Sequence[Record], plan: Plan, network: Network) -> Measured:
    """Takes the times of a plan's ops from the records of some steps."""
    complete = [record for record in records if not math.isnan(sum(record.op_end))]
    for record in complete:
        record.settle()
    busy = [
        busy_s(plan, list(zip(record.op_start, record.op_end, strict=True))) for record in complete
    ]
    paces = [pace for record in complete if (pace := pace_of(record, plan, network))]
    buckets = range(len(plan.buckets))
    return Measured(
        [median(times[index] for times in busy) if busy else None for index in buckets],
        median(paces) if paces else 1.0,
    )


def _layers(record: Record, params: Sequence[FlatParam]) -> dict[str, list[int]]:
    """The parameters of each layer, the layers in order of first use."""
    layers: dict[str, list[int]] = {}
    for index in record.first_use():
        layers.setdefault(params[index].layer, []).append(index)
    return layers


def _forward_spans(record: Record, layers: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Per layer, when its forward began and how long it took, seconds, without waits."""
    began = [max((record.arrived[m] for m in params), default=NEVER) for params in layers]
    needed = [min((record.needed[m] for m in params), default=NEVER) for params in layers]
    spans: list[tuple[float, float]] = []
    for index, start in enumerate(began):
        following = [at for at in needed[index + 1 :] if not math.isnan(at)]
        end = following[0] if following else record.forward_ended
        duration = end - start
        spans.append((start, 0.0 if math.isnan(duration) else max(0.0, duration)))
    return spans


def _backward_spans(record: Record, layers: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Per layer, when its backward began and how long it took, seconds.

    A gradient that is ready before that of a later layer counts as ready with it.
    """
    spans: list[tuple[float, float]] = []
    reached = record.backward_began
    for params in reversed(layers):
        ready = max((at for m in params if not math.isnan(at := record.ready[m])), default=NEVER)
        end = reached if math.isnan(ready) else max(ready, reached)
        spans.append((reached, end - reached))
        reached = end
    return spans[::-1]


def timeline_of(
    record: Record, plan: Plan, params: Sequence[FlatParam], *, title: str = "soonest"
) -> Timeline:
    """A complete record as a timeline that starts with its backward pass."""
    record.settle()
    zero = record.backward_began
    layers = _layers(record, params)
    groups = list(layers.values())
    spans: list[Span] = []
    for name, (start, duration) in zip(layers, _backward_spans(record, groups), strict=True):
        spans.append(Span("compute", "backward", name, start - zero, start + duration - zero))
    for name, (start, duration) in zip(layers, _forward_spans(record, groups), strict=True):
        if not math.isnan(start):
            spans.append(Span("compute", "forward", name, start - zero, start + duration - zero))
    for index, param in enumerate(params):
        waited = record.arrived[index] - record.needed[index]
        if waited > 1e-5:
            start, end = record.needed[index] - zero, record.arrived[index] - zero
            spans.append(Span("compute", "wait", param.layer, start, end))
    for index, op in enumerate(plan.ops):
        start, end = record.op_start[index], record.op_end[index]
        if not math.isnan(start + end):
            name = ", ".join(plan.buckets[op.bucket].layers)
            spans.append(Span("network", "send", name, start - zero, end - zero))
    for bucket in range(len(plan.buckets)):
        start, end = record.update_start[bucket], record.update_end[bucket]
        if not math.isnan(start + end):
            name = ", ".join(plan.buckets[bucket].layers)
            spans.append(Span("update", "update", name, start - zero, end - zero))
    return Timeline(title, record.ended - zero, tuple(spans))
