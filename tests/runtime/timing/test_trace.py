"""What records of steps show, by times that are written by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from soonest.core.cost import Network
from soonest.core.plan import Bucket, Flat, Op, Plan
from soonest.core.trace import Layer, Trace
from soonest.runtime.timing.step_record import NEVER, Record
from soonest.runtime.timing.trace import pace_of, timeline_of, trace_of, typical, updating_s


def param(layer: str, size: int) -> Any:
    return SimpleNamespace(layer=layer, parameter=SimpleNamespace(nbytes=size))


PARAMS = [param("b", 400), param("a", 40), param("b", 4), param("c", 8)]
"""As registered; the forward pass needs a first, then b, and c never."""


def record() -> Record:
    """Backward 0 to 5 s: b has its gradients at 2 and 3, a at 5. Forward from 10: a is needed then
    and there at 11, b needed at 13 and there at 14 and 15, and the pass ends at 18."""
    made = Record(4, 2, 2)
    made.backward_began, made.backward_ended = 0.0, 5.0
    made.ready = [2.0, 5.0, 3.0, NEVER]
    made.needed = [13.0, 10.0, 13.0, NEVER]
    made.arrived = [15.0, 11.0, 14.0, NEVER]
    made.forward_ended, made.ended = 18.0, 18.0
    made.update_start, made.update_end = [6.0, NEVER], [6.5, NEVER]
    made.op_start, made.op_end = [3.0, 4.0], [6.0, 8.0]
    return made


def test_layers_come_in_order_of_use_and_take_what_they_compute() -> None:
    trace = trace_of(record(), record(), PARAMS, model="m", update_s=0.25)
    assert [layer.name for layer in trace.layers] == ["a", "b", "c"]
    assert [layer.bytes for layer in trace.layers] == [40, 404, 8]
    assert [layer.fwd_us for layer in trace.layers] == [2e6, 3e6, 0.0], "without waits"
    assert [layer.bwd_us for layer in trace.layers] == [2e6, 3e6, 0.0]
    assert trace.update_us == 0.25e6


def test_what_is_not_used_comes_last() -> None:
    assert record().first_use() == [1, 0, 2, 3]


def test_updates_that_were_made_count() -> None:
    assert updating_s(record()) == 0.5


def test_the_typical_step_is_the_median_of_each_layer() -> None:
    traces = [
        Trace("m", (Layer("a", 4, fwd, bwd),), update)
        for fwd, bwd, update in ((1.0, 9.0, 3.0), (5.0, 2.0, 1.0), (6.0, 4.0, 2.0))
    ]
    assert typical(traces) == Trace("m", (Layer("a", 4, 5.0, 4.0),), 2.0)


def plan(ops: int) -> Plan:
    flat = Flat.lay_out("float32", 4, [(str(i), str(i), 249) for i in range(ops)])
    each = flat.numel // ops
    buckets = [Bucket(0, i * each, (i + 1) * each, "allreduce", (str(i),)) for i in range(ops)]
    return Plan(2, (flat,), tuple(buckets), tuple(Op(i, "all_reduce") for i in range(ops)))


def test_the_pace_is_that_of_the_network_and_not_of_single_ops() -> None:
    """Two ops of 1024 bytes at 1024 bytes a second should take 2 s. They are in flight from 3 to 8,
    which is 5 s, though they overlap."""
    network = Network.linear(0.0, 1024.0)
    assert pace_of(record(), plan(2), network) == pytest.approx(2.5)


def test_ops_inside_of_the_backward_pass_do_not_count_where_there_are_enough_others() -> None:
    made = Record(4, 5, 5)
    made.backward_ended = 10.0
    made.op_start, made.op_end = [0.0, 10.0, 12.0, 14.0, 16.0], [9.0, 12.0, 14.0, 16.0, 18.0]
    network = Network.linear(0.0, 1024.0)
    assert pace_of(made, plan(5), network) == pytest.approx(2.0)
    made.op_start[4] = made.op_end[4] = math.nan
    assert pace_of(made, plan(5), network) == pytest.approx(15 / 4), "three others are too few"
    assert pace_of(Record(4, 5, 5), plan(5), network) is None


def test_a_step_as_a_timeline() -> None:
    timeline = timeline_of(record(), plan(2), PARAMS)
    assert timeline.step_s == 18.0
    spans = {
        kind: [(s.name, s.start_s, s.end_s) for s in timeline.of(kind)]  # type: ignore[arg-type]
        for kind in ("backward", "forward", "wait", "send", "update")
    }
    assert spans["backward"] == [("b", 0.0, 3.0), ("c", 0.0, 0.0), ("a", 3.0, 5.0)]
    assert spans["forward"] == [("a", 11.0, 13.0), ("b", 15.0, 18.0)]
    assert sorted(spans["wait"]) == [("a", 10.0, 11.0), ("b", 13.0, 14.0), ("b", 13.0, 15.0)]
    assert spans["send"] == [("0", 3.0, 6.0), ("1", 4.0, 8.0)]
    assert spans["update"] == [("0", 6.0, 6.5)]
