"""Why a bucket is reduced as it is, with predicted and measured times."""

from dataclasses import replace

import pytest

from soonest.core.cost import Network
from soonest.core.plan import Op, Plan
from soonest.core.planner.planner import first_plan, flats_of
from soonest.core.planner.report import busy_s, explain
from soonest.core.trace import Layer, Trace

NETWORK = Network.ideal(4, 1e9, latency_s=1e-3)
METHODS = ("allreduce", "exchange", "split")


def plan() -> Plan:
    layers = (Layer("small", 4000, 1, 1), Layer("large", 40_000_000, 1, 1))
    return first_plan(flats_of(Trace("t", layers)), NETWORK, ranks=4, methods=METHODS)


def test_every_bucket_has_a_row_in_the_order_of_sending():
    made = plan()
    times = [0.001 * index for index in range(len(made.buckets))]
    report = explain(made, NETWORK, choices=METHODS, measured_s=times)
    assert [row.bucket for row in report.rows] == list(range(len(made.buckets)))[::-1]
    for row in report.rows:
        assert row.size_bytes == made.bucket_bytes(row.bucket)
        assert row.predicted_s == NETWORK.cost_s(row.method, row.size_bytes)
        assert row.measured_s == times[row.bucket]
        second, cost_ms = row.why.removeprefix("cheapest; ").split(" would take ")
        assert second in METHODS
        assert second != row.method
        found_s = NETWORK.cost_s(second, row.size_bytes)
        assert float(cost_ms.removesuffix(" ms")) == pytest.approx(found_s * 1e3, rel=0.01)
        assert found_s >= row.predicted_s


def test_a_method_that_is_not_the_cheapest_is_not_called_so():
    made = plan()
    dear = replace(
        made,
        buckets=tuple(replace(bucket, method="exchange") for bucket in made.buckets),
        ops=tuple(Op(bucket, "exchange") for bucket in range(len(made.buckets))),
    )
    report = explain(dear, NETWORK, choices=METHODS, measured_s=[None] * len(made.buckets))
    largest = max(report.rows, key=lambda row: row.size_bytes)
    assert not largest.why.startswith("cheapest")
    assert "would take" in largest.why


def test_a_method_that_was_given_has_no_other_reason():
    made = plan()
    nothing = [None] * len(made.buckets)
    report = explain(made, NETWORK, choices=METHODS, measured_s=nothing, given="asked for")
    assert {row.why for row in report.rows} == {"asked for"}
    assert {row.measured_s for row in report.rows} == {None}


def test_printed_it_is_a_table_with_notes():
    made = plan()
    nothing = [None] * len(made.buckets)
    text = str(explain(made, NETWORK, choices=METHODS, measured_s=nothing, notes=["That is all."]))
    head, *rows, note = text.splitlines()
    assert head.split()[:3] == ["bucket", "bytes", "method"]
    assert len(rows) == len(made.buckets)
    assert note == "That is all."


def test_an_op_behind_another_counts_from_the_end_of_that():
    made = plan()
    spans = [(float(index), index + 2.0) for index in range(len(made.ops))]
    busy = busy_s(made, spans)
    first = made.ops[0].bucket
    assert sum(busy) == pytest.approx(len(made.ops) + 1.0)
    assert busy[first] >= 2.0
    assert busy_s(made, [(0.0, 5.0)] * len(made.ops))[first] == 5.0
