"""When ``step()`` returns at once, and when it waits, on ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from helpers.worlds import Loop, Soonest, with_lane
from soonest.runtime.guard import pending


def on_each_rank(use: Callable[[Soonest], Any]) -> None:
    """Calls ``use(trainer)`` on two ranks that have trained for two steps."""
    with_lane(Loop(steps=2), "thread", before_close=use)


def step(trainer: Soonest) -> None:
    trainer.optimizer.zero_grad()
    trainer.model(torch.ones(2, 4)).square().sum().backward()
    trainer.optimizer.step()


def any_is_in_flight(trainer: Soonest) -> bool:
    return any(pending.is_pending(parameter) for parameter in trainer.model.parameters())


def test_it_returns_while_parameters_are_in_flight() -> None:
    def use(trainer: Soonest) -> None:
        trainer.engine.flush()
        step(trainer)
        assert any_is_in_flight(trainer)
        trainer.engine.flush()
        assert not any_is_in_flight(trainer)

    on_each_rank(use)


def test_it_waits_while_the_user_keeps_a_state() -> None:
    """Nobody can make whoever reads it wait."""

    def use(trainer: Soonest) -> None:
        kept = trainer.optimizer.state[trainer.model.last.weight]["momentum_buffer"]
        before = kept.clone()
        step(trainer)
        assert not any_is_in_flight(trainer)
        assert not torch.equal(kept, before)
        del kept
        step(trainer)
        step(trainer)
        assert any_is_in_flight(trainer), "nobody has any more"

    on_each_rank(use)


def test_it_waits_for_parameters_of_which_there_is_a_view() -> None:
    def use(trainer: Soonest) -> None:
        first = trainer.model.first.weight
        view = first.data
        before = view.clone()
        step(trainer)
        assert not pending.is_pending(first)
        assert not torch.equal(view, before)

    on_each_rank(use)
