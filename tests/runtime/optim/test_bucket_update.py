"""The user's optimizer on some of its parameters, as it was when ``step()`` was called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.optim.bucket_update import Updater, is_elementwise, is_separable


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))


def made(**settings: Any) -> tuple[Two, torch.optim.SGD, FlatBuffers, Updater]:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), **settings)
    layout = FlatBuffers(model)
    return model, optimizer, layout, Updater(optimizer, torch.optim.SGD, layout.params)


BOTH: dict[int, Any] = {0: None, 1: None}


def test_settings_are_those_of_the_step_and_not_of_today() -> None:
    model, optimizer, layout, updater = made(lr=0.5)
    for param in layout.params:
        param.raw_grad.fill_(1.0)
    call = updater.call(dict(BOTH))
    optimizer.param_groups[0]["lr"] = 0.25
    updater.apply(call, layout.params[:1])
    assert [model.a.item(), model.b.item()] == [0.5, 1.0], "only what is ready"
    updater.apply(updater.call(dict(BOTH)), layout.params[1:])
    assert [model.a.item(), model.b.item()] == [0.5, 0.75]


def test_a_rate_that_is_a_tensor_is_kept_as_it_is() -> None:
    model, optimizer, layout, updater = made(lr=torch.tensor(0.5))
    layout.params[0].raw_grad.fill_(1.0)
    call = updater.call(dict(BOTH))
    optimizer.param_groups[0]["lr"].fill_(0.0)
    updater.apply(call, layout.params[:1])
    assert model.a.item() == 0.5


def test_states_go_on_from_step_to_step() -> None:
    """With momentum 0.5 and gradients of 1, steps are 1, 1.5 and 1.75 times the rate."""
    model, optimizer, layout, updater = made(lr=0.5, momentum=0.5)
    layout.params[0].raw_grad.fill_(1.0)
    for expected in (0.5, -0.25, -1.125):
        updater.apply(updater.call(dict(BOTH)), layout.params[:1])
        assert model.a.item() == expected
    assert set(optimizer.state) == {model.a}, "under the user's own parameter"


def test_gradients_of_the_users_own_are_used() -> None:
    model, _, layout, updater = made(lr=0.5)
    layout.params[0].raw_grad.fill_(1.0)
    updater.apply(updater.call({0: torch.tensor([4.0]), 1: None}), layout.params)
    assert [model.a.item(), model.b.item()] == [-1.0, 1.0]


def test_what_else_the_optimizer_trains_is_seen_by_its_gradients() -> None:
    _model, optimizer, _layout, updater = made(lr=0.5)
    assert not updater.trains_others()
    other = nn.Parameter(torch.zeros(1))
    optimizer.add_param_group({"params": [other]})
    assert updater.outdated()
    updater.regroup()
    assert not updater.outdated()
    assert not updater.trains_others()
    other.grad = torch.ones(1)
    assert updater.trains_others()
    assert [param.name for param in updater.owned] == ["a", "b"]


def test_which_optimizers_may_be_cut_where() -> None:
    weights = [nn.Parameter(torch.zeros(2, 2))]
    for cls, separable, elementwise in (
        (torch.optim.AdamW, True, True),
        (torch.optim.Muon, True, False),
        (torch.optim.Adafactor, True, False),
        (torch.optim.LBFGS, False, False),
    ):
        optimizer = cls(weights)
        assert is_separable(optimizer) is separable
        assert is_elementwise(optimizer) is elementwise
