"""What another plan leaves behind of the one before."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import soonest
from helpers.ranks import run_ranks
from helpers.steering import keep_to_the_usual_plan, net
from soonest import SoonestError
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.param import FlatParam


def change_plans(shard_optimizer: bool) -> tuple[int, int]:
    """Gradients that were taken to be the user's, and how many there are."""
    gc.disable()
    keep_to_the_usual_plan()
    given_away: list[str] = []
    give_away = FlatBuffers.give_away

    def noting(layout: FlatBuffers, param: FlatParam) -> None:
        given_away.append(param.name)
        give_away(layout, param)

    FlatBuffers.give_away = noting  # type: ignore[method-assign]
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = soonest.prioritize(model, optimizer, shard_optimizer=shard_optimizer)
    engine = handle.engine
    assert engine is not None
    for window in range(2, 8):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(6, 8)).square().sum().backward()
            optimizer.step()
        handle.flush()
        assert handle.plan is not None
        if shard_optimizer:  # nothing but parts are there, under the next plan, too
            with pytest.raises(SoonestError, match="was read after optimizer"):
                model[0].weight.grad.norm()  # type: ignore[union-attr]
        engine.bind(engine.layout, replace(handle.plan, window=window))
        assert handle.plan.window == window
        if shard_optimizer:
            gc.collect()
            with pytest.raises(SoonestError, match="was read after optimizer"):
                model[0].weight.grad.norm()  # type: ignore[union-attr]
    return len(given_away), len(engine.layout.params)


@pytest.mark.parametrize("shard_optimizer", [False, True])
def test_gradients_of_the_plan_before_are_not_taken_for_the_users(shard_optimizer: bool) -> None:
    for given_away, params in run_ranks(change_plans, 2, shard_optimizer):
        assert (given_away, params) == (0, 8)


def detach_where_one_rank_has_gradients_of_its_own(window: int) -> bool:
    """Whether it has them still."""
    keep_to_the_usual_plan()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = soonest.prioritize(model, optimizer, shard_optimizer=True, timeout_s=10)
    mine: list[torch.Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    model(torch.randn(6, 8)).square().sum().backward()
    if torch.distributed.get_rank() == 1:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
            mine.append(parameter.grad)
    optimizer.step()
    handle.flush()
    engine = handle.engine
    assert engine is not None
    assert handle.plan is not None
    engine.bind(engine.layout, replace(handle.plan, window=window))
    handle.detach()
    return all(
        parameter.grad is grad and torch.equal(grad, torch.ones_like(grad))
        for parameter, grad in zip(model.parameters(), mine, strict=False)
    )


def test_ranks_agree_on_what_there_is_to_complete() -> None:
    assert all(run_ranks(detach_where_one_rank_has_gradients_of_its_own, 2, 3))


class FromTheEnd(nn.Module):
    """Its layers are used in another order than that in which they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(64, 4), nn.Linear(64, 64), nn.Linear(8, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x).relu()).relu())


def buffers_when_the_order_is_known(shard_optimizer: bool) -> tuple[bool, int]:
    """Whether there are other buffers behind the first step, and how many old ones are left."""
    keep_to_the_usual_plan()
    model = FromTheEnd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = soonest.prioritize(model, optimizer, shard_optimizer=shard_optimizer)
    engine = handle.engine
    assert engine is not None
    gc.collect()
    gc.disable()
    layout = id(engine.layout)
    before = [weakref.ref(grads) for grads in engine.layout.grads]
    model(torch.randn(6, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(torch.randn(6, 8))
    return id(engine.layout) != layout, sum(grads() is not None for grads in before)


@pytest.mark.parametrize("shard_optimizer", [False, True])
def test_buffers_of_the_plan_before_are_freed(shard_optimizer: bool) -> None:
    for found in run_ranks(buffers_when_the_order_is_known, 2, shard_optimizer):
        assert found == (True, 0)
