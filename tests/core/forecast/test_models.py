"""Counted models: parameters and work as their papers and torchvision state them."""

import pytest

from soonest.core.forecast.models import MODELS, trace_of


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("alexnet", 61_100_840, 0.714),
        ("vgg16", 138_357_544, 15.47),
        ("resnet50", 25_557_032, 4.089),
        ("resnet101", 44_549_160, 7.801),
        ("resnet152", 60_192_808, 11.514),
        ("vit-b-16", 86_567_656, 17.56),
        ("vit-l-16", 304_326_632, 61.55),
        ("bert-base", 109_482_240, None),
        ("bert-large", 335_141_888, None),
        ("gpt2-small", 124_439_808, None),
        ("gpt2-medium", 354_823_168, None),
        ("gpt2-large", 774_030_080, None),
        ("gpt2-xl", 1_557_611_200, None),
    ],
)
def test_sizes(name: str, parameters: int, gmacs: float | None):
    blocks = MODELS[name]()
    assert sum(block.parameters for block in blocks) == parameters
    if gmacs:
        assert sum(block.macs for block in blocks) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_every_model_is_tested():
    (mark,) = (m for m in test_sizes.pytestmark if m.name == "parametrize")
    assert {case[0] for case in mark.args[1]} == set(MODELS)


def test_times_follow_from_the_throughput():
    one, two = trace_of("resnet50", tflops=10), trace_of("resnet50", tflops=20, batch=64)
    assert one.forward_s == pytest.approx(two.forward_s)
    assert one.forward_s == pytest.approx(32 * 2 * 4.089e9 / 10e12, rel=1e-3)
    assert one.backward_s == pytest.approx(2 * one.forward_s)
    assert two.info["batch_size"] == 64


def test_what_cannot_be():
    with pytest.raises(ValueError, match="no model 'lenet': there are alexnet"):
        trace_of("lenet", tflops=1)
    with pytest.raises(ValueError, match="both must be above zero"):
        trace_of("alexnet", tflops=0)
