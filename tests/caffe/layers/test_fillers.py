"""How blobs start."""

from __future__ import annotations

import math

import pytest
import torch

from soonest.caffe.layers.fillers import filled
from soonest.caffe.proto.text import parse

SHAPE = (60, 40, 5, 5)


def fill(spec: str, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return filled(shape, parse(spec, "FillerParameter"), torch.Generator().manual_seed(0))


FANS = {"FAN_IN": 1000, "FAN_OUT": 1500, "AVERAGE": 1250}


@pytest.mark.parametrize("fan", FANS)
def test_fillers_by_fan(fan: str):
    limit = math.sqrt(3 / FANS[fan])
    xavier = fill(f'type: "xavier" variance_norm: {fan}')
    assert 0.99 * limit < xavier.max().item() <= limit
    assert -limit <= xavier.min().item() < -0.99 * limit
    msra = fill(f'type: "msra" variance_norm: {fan}')
    assert msra.std().item() == pytest.approx(math.sqrt(2 / FANS[fan]), rel=0.02)


def test_simple_fillers():
    assert fill("value: 3").unique().tolist() == [3]
    assert fill("").unique().tolist() == [0]
    uniform = fill('type: "uniform" min: -1 max: 3')
    assert -1 <= uniform.min().item() < -0.99
    assert 2.99 < uniform.max().item() <= 3
    normal = fill('type: "gaussian" mean: 1 std: 0.5')
    assert normal.mean().item() == pytest.approx(1, abs=0.01)
    assert normal.std().item() == pytest.approx(0.5, rel=0.02)


def test_a_sparse_filler_leaves_so_many_inputs_of_each_output():
    kept = (fill('type: "gaussian" sparse: 6') != 0).float().mean().item()
    assert kept == pytest.approx(6 / 60, rel=0.05)


def test_the_unit_ball():
    ball = fill('type: "positive_unitball"', (5, 40))
    assert ball.min() >= 0
    assert ball.sum(1).tolist() == pytest.approx([1] * 5, rel=1e-5)


def test_bilinear_is_what_upsampling_by_two_takes():
    rows = fill('type: "bilinear"', (2, 1, 4, 4))[1, 0] * 16
    assert rows.tolist() == [[1, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]
    assert fill('type: "bilinear"', (1, 1, 3, 3))[0, 0].tolist() == [
        [0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]
    ]  # fmt: skip


def test_the_same_seed_fills_the_same():
    assert torch.equal(fill('type: "xavier"'), fill('type: "xavier"'))
