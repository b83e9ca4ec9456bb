"""Timelines: order, busy time, what is hidden, and JSON."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soonest.core.timeline import Span, Timeline, covered_s

LINE = Timeline(
    "x",
    10.0,
    (
        Span("network", "send", "b", 3.0, 7.0),
        Span("network", "send", "a", 1.0, 4.0),
        Span("compute", "backward", "l", 0.0, 5.0),
        Span("compute", "wait", "l", 5.0, 6.5),
        Span("update", "update", "l", 7.0, 8.0),
    ),
)


def test_spans_come_in_order_of_time():
    assert [span.name for span in LINE.of("send")] == ["a", "b"]
    assert [span.kind for span in LINE.of("wait", "backward")] == ["backward", "wait"]


def test_busy_time_counts_overlaps_once():
    assert LINE.busy_s("send") == 6.0
    assert LINE.busy_s("update", "send") == 7.0
    assert LINE.busy_s("forward") == 0.0


def test_hidden_share_is_what_the_compute_did_not_wait_for():
    assert LINE.hidden_share == pytest.approx(1 - 1.5 / 6)
    assert Timeline("idle", 1.0, ()).hidden_share == 1.0


def test_a_span_cannot_end_before_it_starts():
    with pytest.raises(AssertionError, match="z ends before"):
        Span("compute", "other", "z", 1.0, 0.5)


def test_json_round_trip():
    for line in (LINE, replace(LINE, note="rank 2 is late")):
        assert Timeline.from_json(json.loads(json.dumps(line.to_json()))) == line
        assert line.scaled(2).note == line.note


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda x: tuple(sorted(x)))))
def test_covered_time_is_the_union(intervals):
    union = {second for start, end in intervals for second in range(start, end)}
    assert covered_s(intervals) == len(union)


def test_a_scaled_step_is_as_much_longer_in_all():
    step = Timeline("slow", 4.0, (Span("network", "send", "a", 1.0, 3.0),))
    assert step.scaled(0.5, title="real") == Timeline(
        "real", 2.0, (Span("network", "send", "a", 0.5, 1.5),)
    )
