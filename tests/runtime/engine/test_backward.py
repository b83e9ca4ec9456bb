"""Gradients that a pass adds to, leaves alone or never had, on ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.worlds import LANES, Loop, Net, Soonest, adamw, with_lane
from soonest.runtime.guard import pending


def on_each_rank(use: Callable[[Soonest, int], None], **loop: Any) -> None:
    """Calls ``use(trainer, rank)`` on two ranks that have not trained yet."""
    done: list[int] = []

    def before_close(trainer: Soonest) -> None:
        rank = trainer.engine.ranks.group.rank()
        use(trainer, rank)
        done.append(rank)

    with_lane(Loop(steps=0, **loop), "thread", before_close=before_close)
    assert sorted(done) == [0, 1]


def backward(model: Net, rank: int, *, spare: bool) -> None:
    model(torch.full((2, 4), 1.0 + rank), spare=spare).square().sum().backward()


def gradient(model: Net) -> Tensor:
    found = model.spare.weight.grad
    assert found is not None
    return found


def test_what_no_rank_adds_to_stays_each_ranks_own() -> None:
    def use(trainer: Soonest, rank: int) -> None:
        model = trainer.model
        backward(model, rank, spare=True)
        gradient(model).mul_(1.0 + rank)
        own = gradient(model).clone()
        backward(model, rank, spare=False)
        assert torch.equal(gradient(model), own)

    on_each_rank(use)


def test_what_was_added_under_no_sync_counts_for_one_combined_pass_and_no_more() -> None:
    def use(trainer: Soonest, rank: int) -> None:
        model = trainer.model
        with trainer.no_sync():
            backward(model, rank, spare=True)
        mine = gradient(model).clone()
        backward(model, rank, spare=False)
        assert not torch.equal(gradient(model), mine), "it is the mean over the ranks by now"
        gradient(model).mul_(1.0 + rank)
        own = gradient(model).clone()
        backward(model, rank, spare=False)
        assert torch.equal(gradient(model), own)

    on_each_rank(use)


def test_a_gradient_with_a_view_has_its_value_when_the_pass_ends() -> None:
    """Whoever reads the view cannot be made to wait."""

    def use(trainer: Soonest, rank: int) -> None:
        model = trainer.model
        mine = model.first.weight.grad = torch.zeros_like(model.first.weight)
        view = mine.view(-1)
        backward(model, rank, spare=True)
        assert not pending.is_pending(mine)
        seen = view.clone()
        trainer.engine.flush()
        assert torch.equal(seen, mine.view(-1))
        assert mine.abs().sum() > 0

    on_each_rank(use)


@pytest.mark.parametrize("zero", [True, False])
def test_a_second_step_leaves_alone_what_no_rank_has_used(zero: bool) -> None:
    """With weight decay a gradient of zeros would move it."""

    def use(trainer: Soonest, rank: int) -> None:
        model = trainer.model
        before = [p.detach().clone() for p in model.spare.parameters()]
        backward(model, rank, spare=False)
        trainer.optimizer.step()
        trainer.optimizer.step()
        for parameter, value in zip(model.spare.parameters(), before, strict=True):
            assert torch.equal(parameter, value)
            assert parameter.grad is None
        if zero:
            trainer.optimizer.zero_grad()

    on_each_rank(use, optimizer=adamw)


@pytest.mark.parametrize("kind", LANES)
def test_only_one_rank_has_used_it(kind: str) -> None:
    seen: dict[int, list[Tensor]] = {}

    def use(trainer: Soonest) -> None:
        rank, model = trainer.engine.ranks.group.rank(), trainer.model
        backward(model, 1, spare=rank == 1)
        seen[rank] = [gradient(model).clone()]
        trainer.optimizer.step()
        seen[rank].append(model.spare.weight.detach().clone())

    with_lane(Loop(steps=0), kind, before_close=use)
    alone = Net()
    backward(alone, 1, spare=True)
    for rank in range(2):
        torch.testing.assert_close(seen[rank][0], gradient(alone) / 2)
        moved = nn.Linear(6, 6).weight.data.copy_(alone.spare.weight) - 0.1 * seen[rank][0]
        torch.testing.assert_close(seen[rank][1], moved)
