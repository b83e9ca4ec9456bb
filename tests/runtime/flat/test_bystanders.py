"""Who is found to keep what an optimizer's state consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from soonest.runtime.flat.bystanders import States

KEEP: dict[str, Callable[[Any], Any]] = {
    "all of it": lambda optimizer: optimizer.state,
    "what a parameter has": lambda optimizer: next(iter(optimizer.state.values())),
    "a tensor": lambda optimizer: next(iter(optimizer.state.values()))["exp_avg"],
    "a view": lambda optimizer: next(iter(optimizer.state.values()))["exp_avg"].view(-1),
    "a state_dict": lambda optimizer: optimizer.state_dict(),
}


def trained() -> torch.optim.Optimizer:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("what", KEEP)
def test_who_keeps_something_is_found_until_it_is_gone(what: str) -> None:
    optimizer = trained()
    states = States(optimizer.__dict__)
    kept = KEEP[what](optimizer)
    assert not states.are_kept(names=0), "nobody has asked for it"
    states.given()
    assert states.are_kept(names=0)
    assert states.are_kept(names=0)
    del kept
    assert not states.are_kept(names=0)


def test_a_checkpoint_that_is_still_there_is_not_looked_for() -> None:
    checkpoint = trained().state_dict()
    optimizer = trained()
    states = States(optimizer.__dict__)
    optimizer.load_state_dict(checkpoint)
    states.loaded()
    states.given()
    assert not states.are_kept(names=0)
    kept = optimizer.state_dict()
    states.given()
    assert states.are_kept(names=0)
    assert kept
    assert checkpoint
