"""Traces: what they add up to, what they refuse, and the files they come from."""

import json

import pytest
from hypothesis import given

from helpers.strategies import traces
from soonest.core.trace import Layer, Trace

TWO = Trace("two", (Layer("a", 8, 1.0, 2.0), Layer("b", 4, 10.0, 20.0)), update_us=3.0)


def test_sums():
    assert TWO.total_bytes == 12
    assert TWO.forward_s == pytest.approx(11e-6)
    assert TWO.backward_s == pytest.approx(22e-6)


def test_the_backward_pass_makes_the_last_gradient_first():
    assert TWO.ready_s() == pytest.approx([22e-6, 20e-6])


def test_a_tail_is_a_layers_forward_and_all_behind_it():
    assert TWO.tail_s() == pytest.approx([11e-6, 10e-6])


@given(traces())
def test_json_round_trip(trace: Trace):
    assert Trace.from_json(json.loads(json.dumps(trace.to_json()))) == trace


def test_json_keeps_what_it_does_not_know():
    trace = Trace.from_json({**TWO.to_json(), "device": "abacus"})
    assert trace.info == {"device": "abacus"}
    assert trace.to_json()["device"] == "abacus"


@pytest.mark.parametrize("label", ["bytes", "fwd_us", "bwd_us"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_layer_refuses_what_cannot_be(label: str, value: float):
    with pytest.raises(ValueError, match=f"layer 'x': {label}"):
        Layer(**{"name": "x", "bytes": 1, "fwd_us": 1.0, "bwd_us": 1.0, label: value})


def test_a_trace_needs_layers():
    with pytest.raises(ValueError, match="no layers"):
        Trace("empty", ())


def test_names_are_unique():
    with pytest.raises(ValueError, match="'a' twice"):
        Trace("twins", (Layer("a", 1, 1, 1), Layer("a", 2, 2, 2)))


@pytest.mark.parametrize("missing", ["name", "bytes", "fwd_us", "bwd_us"])
def test_json_without_a_field_names_it(missing: str):
    data = TWO.to_json()
    del data["layers"][1][missing]
    with pytest.raises(ValueError, match=f"'{missing}' is missing"):
        Trace.from_json(data)


def test_json_of_the_wrong_kind_is_refused():
    with pytest.raises(ValueError, match="no trace"):
        Trace.from_json({"model": "x", "layers": 3})


def test_every_shipped_trace_loads():
    assert {"alexnet", "googlenet", "resnet50", "vgg16"} <= set(Trace.shipped())
    for name in Trace.shipped():
        trace = Trace.load(name)
        assert trace.total_bytes > 1e6
        assert 0 < trace.forward_s < trace.backward_s


def test_a_trace_loads_from_a_path(tmp_path):
    path = tmp_path / "two.json"
    path.write_text(json.dumps(TWO.to_json()))
    assert Trace.load(path) == TWO
    assert Trace.load(str(path)) == TWO


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "is a list"), ("{}", "is missing")]
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, text: str, message: str):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Trace.load(path)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="alexnet, googlenet"):
        Trace.load("alexnett")


def test_heads_and_tails():
    """The last layer's gradient is ready first; a tail is a layer's own forward and all behind."""
    layers = (Layer("a", 4, 1e6, 10e6), Layer("b", 4, 2e6, 20e6), Layer("c", 4, 3e6, 30e6))
    trace = Trace("three", layers)
    assert trace.ready_s() == pytest.approx([60, 50, 30])
    assert trace.tail_s() == pytest.approx([6, 5, 3])
    assert (trace.forward_s, trace.backward_s) == pytest.approx((6, 60))
