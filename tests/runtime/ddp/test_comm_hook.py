"""What a communication hook is given and what becomes of its answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from soonest.runtime.ddp.buckets import whole_plan
from soonest.runtime.ddp.comm_hook import GradBucket
from soonest.runtime.flat.buffers import trainable


def test_a_bucket_is_one_row_and_its_answer_goes_back_to_each_gradient() -> None:
    gradients = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0])]
    params: Any = [SimpleNamespace(raw_grad=gradient, parameter=None) for gradient in gradients]
    bucket = GradBucket(3, params, is_last=True)
    assert (bucket.index(), bucket.is_last()) == (3, True)
    assert bucket.buffer().tolist() == [1, 2, 3, 4, 5]
    assert [g.tolist() for g in bucket.gradients()] == [[[1, 2], [3, 4]], [5]]
    bucket.take([10 * bucket.buffer()])
    assert [g.tolist() for g in gradients] == [[[10, 20], [30, 40]], [50]]
    bucket.take(bucket.buffer() + 1)
    assert [g.tolist() for g in gradients] == [[[2, 3], [4, 5]], [6]]


def test_buckets_hold_whole_parameters_and_go_from_the_back() -> None:
    """Layers of 4 bytes times 10, 20 and 30 weights, in buckets of 120 bytes or more."""
    model = nn.Sequential(*(nn.Linear(10, n, bias=False) for n in (1, 2, 3)))
    plan = whole_plan(trainable(model), ranks=2, caps_bytes=[120])
    assert [plan.buckets[op.bucket].layers for op in plan.ops] == [("2",), ("0", "1")]
    one = whole_plan(trainable(model), ranks=2)
    assert [bucket.layers for bucket in one.buckets] == [("0", "1", "2")]
    assert one.window == 1
