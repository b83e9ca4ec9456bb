"""Which layers a span carries, and how collectives in flight together are told apart."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soonest.core.cost import Network
from soonest.core.planner.planner import flats_of, make_plan
from soonest.core.simulator.simulate import simulate
from soonest.core.timeline import Span, Timeline, covered_s
from soonest.core.trace import Trace
from soonest.report.urgency import Urgency, in_turn


@pytest.fixture
def urgency() -> Urgency:
    forward = [Span("compute", "forward", name, i, i + 1) for i, name in enumerate("abcde")]
    return Urgency(Timeline("any", 5.0, tuple(reversed(forward))))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("c", "c"),
        ("bucket 3 (1.05 MB of b)", "b"),
        ("bucket 3 (1.05 MB of b, c, d)", "bcd"),
        ("bucket 3 (1.05 MB of a, b, c and 2 more)", "abcde"),
        ("bucket 3 (1.05 MB of d, e and 9 more)", "de"),
        ("e, a", "ae"),
        ("all of it", ""),
        ("", ""),
    ],
)
def test_a_name_tells_the_layers(urgency: Urgency, name: str, layers: str):
    assert urgency.layers_of(Span("network", "send", name, 0, 1)) == list(layers)


def test_places_go_from_the_first_needed_to_the_last(urgency: Urgency):
    assert [urgency.place(layer) for layer in "abcde"] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_one_layer_alone_is_needed_first():
    only = Timeline("any", 1.0, (Span("compute", "forward", "a", 0, 1),))
    assert Urgency(only).place("a") == 0.0


@pytest.mark.parametrize("model", Trace.shipped())
def test_the_names_that_plans_give_are_understood(model: str):
    trace = Trace.load(model)
    network = Network.ideal(4, 1e9)
    plan = make_plan(trace, flats_of(trace), network, ranks=4)
    timeline = simulate(trace, plan, network)
    urgency = Urgency(timeline)
    for span, op in zip(sorted(timeline.of("send"), key=lambda s: s.end_s), plan.ops, strict=True):
        assert span.name == plan.describe(op.bucket)
        assert urgency.layers_of(span) == list(plan.buckets[op.bucket].layers)


def test_in_turn_every_moment_belongs_to_what_lands_first():
    spans = [
        Span("network", "send", "x", 0.0, 4.0),
        Span("network", "send", "y", 1.0, 2.0),
        Span("network", "send", "z", 3.0, 7.0),
        Span("network", "send", "nothing", 6.5, 6.5),
    ]
    assert [(s.name, s.start_s, s.end_s) for s in in_turn(spans)] == [
        ("x", 0.0, 1.0),
        ("y", 1.0, 2.0),
        ("x", 2.0, 4.0),
        ("z", 4.0, 7.0),
    ]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), max_size=8))
def test_in_turn_keeps_all_busy_time_and_overlaps_nowhere(intervals: list[list[int]]):
    spans = [Span("network", "send", str(i), *ends) for i, ends in enumerate(intervals)]
    taken = in_turn(spans)
    assert sum(s.end_s - s.start_s for s in taken) == covered_s((s.start_s, s.end_s) for s in spans)
    assert all(one.end_s <= other.start_s for one, other in pairwise(taken))
