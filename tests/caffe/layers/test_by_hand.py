"""Layers by numbers that are worked out by hand; beside real Caffe they are in ``test_layers``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from soonest.caffe.layers.pooling import windows
from soonest.caffe.net.net import Net
from soonest.caffe.proto.text import parse


def layer(spec: str, *bottoms: Tensor, phase: str = "TRAIN", top: str = 'top: "top"') -> Any:
    """A layer of its own."""
    names = [f"b{number}" for number in range(len(bottoms))]
    source = ""
    for name, bottom in zip(names, bottoms, strict=True):
        shape = " ".join(f"dim: {size}" for size in bottom.shape)
        source += (
            f'layer {{ name: "{name}" type: "Input" top: "{name}" '
            f"input_param {{ shape {{ {shape} }} }} }}\n"
        )
    reads = " ".join(f'bottom: "{name}"' for name in names)
    source += f'layer {{ name: "it" {reads} {top} {spec} }}'
    return Net(parse(source, "NetParameter"), phase).layers["it"]


def run(spec: str, *bottoms: Tensor, phase: str = "TRAIN") -> Tensor:
    """What a layer gives."""
    return layer(spec, *bottoms, phase=phase)(*bottoms)


def image(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)[None, None]


NINE = image([1, 2, 3], [4, 5, 6], [7, 8, 9])


def test_an_average_counts_the_padding_around_the_data():
    """A kernel of 2 with padding 1 and stride 2: windows at -1 and 1 along each axis."""
    found = run('type: "Pooling" pooling_param { pool: AVE kernel_size: 2 stride: 2 pad: 1 }', NINE)
    # 1 / 4; (2 + 3) / 4; (4 + 7) / 4; (5 + 6 + 8 + 9) / 4.
    assert found.flatten().tolist() == [0.25, 1.25, 2.75, 7.0]


def test_a_window_beyond_the_padding_is_divided_by_what_is_inside():
    """A kernel of 2 with stride 2 and no padding: the second window has one row and column."""
    found = run('type: "Pooling" pooling_param { pool: AVE kernel_size: 2 stride: 2 }', NINE)
    # (1 + 2 + 4 + 5) / 4; (3 + 6) / 2; (7 + 8) / 2; 9 / 1.
    assert found.flatten().tolist() == [3.0, 4.5, 7.5, 9.0]


def test_a_maximum_knows_no_padding():
    found = run(
        'type: "Pooling" pooling_param { pool: MAX kernel_size: 2 stride: 2 pad: 1 }', -NINE
    )
    assert found.flatten().tolist() == [-1.0, -2.0, -4.0, -5.0]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad", "ceil", "number"),
    [
        (3, 2, 2, 0, True, 2),  # a last one that is not full
        (3, 2, 2, 0, False, 1),
        (4, 2, 2, 0, True, 2),
        (3, 2, 2, 1, True, 2),  # that at 3 would begin in the padding behind
        (5, 3, 2, 1, True, 3),
    ],
)
def test_how_many_windows_there_are(
    size: int, kernel: int, stride: int, pad: int, ceil: bool, number: int
):
    assert windows(size, kernel, stride, pad, ceil=ceil) == number


def test_batch_norm_adds_up_statistics_and_divides_by_their_weight():
    """A fraction of 0.5: weights are 1, then 1.5."""
    spec = 'type: "BatchNorm" batch_norm_param { moving_average_fraction: 0.5 eps: 1e-9 }'
    x = torch.tensor([[0.0], [2.0]])
    norm = layer(spec, x)
    assert norm(x).flatten().tolist() == [-1.0, 1.0]
    norm(3 * x + 5)
    # mean: 0.5·1 + 8 = 8.5. The variance is that of n - 1: 2, then 18: 0.5·2 + 18 = 19.
    assert (norm.scale.item(), norm.mean.item(), norm.variance.item()) == (1.5, 8.5, 19.0)
    norm.stored = True
    # (x - 8.5 / 1.5) / √(19 / 1.5)
    wanted = [(v - 8.5 / 1.5) / (19 / 1.5) ** 0.5 for v in (0.0, 2.0)]
    assert norm(x).flatten().tolist() == pytest.approx(wanted)


def test_local_response_within_a_channel_takes_the_mean_of_squares():
    spec = 'type: "LRN" lrn_param { norm_region: WITHIN_CHANNEL local_size: 3 alpha: 9 beta: 0.5 }'
    found = run(spec, torch.ones(1, 1, 3, 3))
    # In the middle 9 ones over 9: 1 / √(1 + 9·1); in a corner 4 over 9: 1 / √(1 + 9·4/9).
    assert found[0, 0, 1, 1].item() == pytest.approx(10**-0.5)
    assert found[0, 0, 0, 0].item() == pytest.approx(5**-0.5)


def test_local_response_across_channels():
    x = torch.tensor([1.0, 2.0, 3.0])[None, :, None, None]
    found = run('type: "LRN" lrn_param { local_size: 3 alpha: 3 beta: 1 }', x)
    # 1 / (1 + 3/3·(1 + 4)); 2 / (1 + 1 + 4 + 9); 3 / (1 + 4 + 9).
    assert found.flatten().tolist() == pytest.approx([1 / 6, 2 / 15, 3 / 14])


LOGS = torch.log(torch.tensor([[1.0, 3.0], [1.0, 1.0], [4.0, 1.0]]))
"""Scores whose softmax gives 1/4 and 3/4; 1/2 and 1/2; 4/5 and 1/5."""


@pytest.mark.parametrize(
    ("mode", "divisor"), [("VALID", 2), ("FULL", 3), ("BATCH_SIZE", 3), ("NONE", 1)]
)
def test_a_softmax_loss_divides_by_what_counts(mode: str, divisor: int):
    spec = f'type: "SoftmaxWithLoss" loss_param {{ ignore_label: 1 normalization: {mode} }}'
    found = run(spec, LOGS, torch.tensor([0.0, 1.0, 0.0]))
    # -log(1/4) - log(4/5) = log 5, of the first and the last place.
    assert found.item() == pytest.approx(torch.tensor(5.0).log().item() / divisor)


def test_a_euclidean_loss_is_half_of_the_mean_square():
    found = run('type: "EuclideanLoss"', torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2))
    assert found.item() == 10 / (2 * 2)


def test_a_hinge_loss():
    # Of label 0: (1 - 2)⁺ + (1 + 0.5)⁺ = 1.5; of label 1: (1 - 1)⁺ + (1 + 3)⁺ = 4; over 2.
    scores = torch.tensor([[2.0, 0.5], [3.0, 1.0]])
    assert run('type: "HingeLoss"', scores, torch.tensor([0.0, 1.0])).item() == 2.75


def test_an_equal_score_counts_as_a_better_one():
    scores = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    found = run('type: "Accuracy"', scores, torch.tensor([0.0, 0.0, 0.0]), phase="TEST")
    assert found.item() == pytest.approx(1 / 3)


def test_a_contrastive_loss():
    first, second = torch.tensor([[3.0], [0.5]]), torch.tensor([[0.0], [0.0]])
    spec = 'type: "ContrastiveLoss" contrastive_loss_param { margin: 2 }'
    # Alike: 9. Apart: (2 - 0.5)² = 2.25. Over 2·2.
    found = run(spec, first, second, torch.tensor([1.0, 0.0]))
    assert found.item() == pytest.approx(11.25 / 4)
