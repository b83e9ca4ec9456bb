"""How gradients come into the flat buffers."""

from __future__ import annotations

import torch
from torch import nn

from helpers.worlds import FAILURES
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.gradients import Gradients


def made(ranks: int, dtype: torch.dtype = torch.float32) -> tuple[FlatBuffers, Gradients]:
    layout = FlatBuffers(nn.Linear(2, 1).to(dtype))
    return layout, Gradients(layout, ranks, FAILURES)


def test_gradients_are_divided_before_they_are_summed() -> None:
    layout, gradients = made(4)
    weight = layout.params[0]
    weight.parameter.grad = torch.tensor([[8.0, 2.0]])
    assert gradients.take(weight, fresh=True) is None
    assert weight.raw_grad.tolist() == [[2.0, 0.5]]
    assert weight.parameter.grad is weight.grad
    gradients.divide_by(2)
    assert gradients.take(weight, fresh=False) is None
    assert weight.raw_grad.tolist() == [[1.0, 0.25]]


def test_narrow_gradients_are_divided_exactly() -> None:
    """190 / 3 is 63.33, which bfloat16 has as 63.25. 1/3 alone it has as 0.333984375, and 190 times
    that is 63.46, which would be 63.5."""
    layout, gradients = made(3, torch.bfloat16)
    weight = layout.params[0]
    weight.parameter.grad = torch.tensor([[190.0, 3.0]], dtype=torch.bfloat16)
    gradients.take(weight, fresh=True)
    assert weight.raw_grad.tolist() == [[63.25, 1.0]]


def test_a_gradient_that_the_user_keeps_stays_the_users() -> None:
    layout, gradients = made(2)
    weight = layout.params[0]
    mine = weight.parameter.grad = torch.tensor([[8.0, 2.0]])
    assert gradients.take(weight, fresh=True) is mine
    assert weight.parameter.grad is mine
    assert weight.raw_grad.tolist() == [[4.0, 1.0]]


def test_the_optimizer_is_given_what_is_there() -> None:
    layout, gradients = made(2)
    weight, bias = layout.params
    weight.parameter.grad = weight.grad
    assert gradients.of(layout.params, (), {}) == {0: None}, "None stands for the buffer"
    bias.parameter.grad = None
    assert gradients.of(layout.params, {bias.order}, {}) == {0: None, 1: None}
    own = bias.parameter.grad = torch.ones(1)
    assert gradients.of(layout.params, (), {})[1] is own
    assert gradients.of(layout.params, (), {bias.order: own})[1] is None, "a copy that is written"


def test_the_gradient_of_another_parameter_is_taken_as_it_is_now() -> None:
    layout, gradients = made(2)
    weight, bias = layout.params
    weight.parameter.grad = weight.grad
    weight.raw_grad.fill_(3.0)
    bias.parameter.grad = weight.grad.flatten()[:1]
    given = gradients.of(layout.params, (), {})[bias.order]
    weight.raw_grad.fill_(9.0)
    assert given is not None
    assert given.tolist() == [3.0]
