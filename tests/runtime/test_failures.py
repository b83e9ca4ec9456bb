"""A rank that is lost, late or different becomes an error on the others, and nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import soonest
from ranks import run_ranks, say_done, wait_for_the_others
from soonest import PeerLostError, PlanMismatchError, SoonestError


def model_and_optimizer(width: int = 64) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        loss = model(torch.randn(4, 8)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def error_of(function: Any, *args: Any) -> tuple[str, str, float]:
    """Name, message and time of the error that a call raises."""
    began = time.monotonic()
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "", "", time.monotonic() - began


def a_rank_dies(how: str) -> tuple[str, str, float]:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    if dist.get_rank() == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    return error_of(steps, model, optimizer, 1000)


@pytest.mark.parametrize("how", ["killed", "leaves"])
def test_a_dead_rank_is_named(how: str) -> None:
    results = run_ranks(a_rank_dies, 4, how, may_die=True, collective_timeout_s=60)
    assert results[2] is None
    for rank in (0, 1, 3):
        name, message, took_s = results[rank]
        assert name == PeerLostError.__name__
        assert "rank 2 " in message, message
        assert took_s < 40


def a_rank_skips(timeout_s: float) -> tuple[str, str, float] | None:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer, timeout_s=timeout_s)
    steps(model, optimizer, 7)
    if dist.get_rank() == 1:
        wait_for_the_others()
        return None
    found = error_of(steps, model, optimizer, 1000)
    say_done()
    return found


def test_a_rank_that_does_not_come_is_named_after_the_timeout() -> None:
    results = run_ranks(a_rank_skips, 3, 4.0)
    for rank in (0, 2):
        name, message, took_s = results[rank]
        assert name == PeerLostError.__name__
        assert "rank 1 " in message
        assert "step 7: bucket " in message
        assert took_s < 4 + 15


def after_a_loss() -> list[str]:
    model, optimizer = model_and_optimizer()
    handle = soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    if dist.get_rank() == 1:
        os._exit(1)
    errors = [
        error_of(steps, model, optimizer, 1000)[0],
        error_of(steps, model, optimizer, 1)[0],
        error_of(handle.flush)[0],
    ]
    handle.detach()
    assert all(p.isfinite().all() for p in model.parameters())
    steps(model, optimizer, 2)  # alone
    return errors


def test_after_a_loss_everything_raises_until_detached() -> None:
    survivor, dead = run_ranks(after_a_loss, 2, may_die=True)
    assert dead is None
    assert survivor == ["PeerLostError"] * 3


def other_model() -> tuple[str, str, float]:
    model, optimizer = model_and_optimizer(width=64 + (dist.get_rank() == 1))
    return error_of(soonest.prioritize, model, optimizer)


def test_another_model_is_named() -> None:
    for name, message, _ in run_ranks(other_model, 3):
        assert name == PlanMismatchError.__name__
        assert "parameter 0 is 0.weight (64, 8)" in message
        assert "(65, 8)" in message
        assert "rank 1" in message


def other_plan() -> tuple[str, str, float]:
    model, optimizer = model_and_optimizer()
    handle = soonest.prioritize(model, optimizer)
    steps(model, optimizer, 2)
    plan = handle.plan
    assert plan is not None
    handle.detach()
    if dist.get_rank() == 1:
        plan = soonest.Plan(plan.ranks, plan.flats, plan.buckets, plan.ops, window=3)
    return error_of(lambda: soonest.prioritize(model, optimizer, plan=plan))


def test_another_plan_is_named() -> None:
    for name, message, _ in run_ranks(other_plan, 2):
        assert name == PlanMismatchError.__name__
        assert "window: 2 / 3" in message


def other_wish() -> tuple[str, str, float]:
    model, optimizer = model_and_optimizer()
    method = "gather" if dist.get_rank() == 1 else None
    return error_of(lambda: soonest.prioritize(model, optimizer, method=method))


def test_another_wish_is_named() -> None:
    for name, message, took_s in run_ranks(other_wish, 2):
        assert name == PlanMismatchError.__name__
        assert "method is None on rank 0 and gather on rank 1" in message
        assert took_s < 20


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raise KeyError("boom")


def backward_raises() -> list[tuple[str, str, float]]:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)

    def fail() -> None:
        hidden = Boom.apply(model[0](torch.randn(4, 8)))  # type: ignore[index]
        model[2](torch.relu(hidden)).sum().backward()  # type: ignore[index]

    return [error_of(fail), error_of(optimizer.step), error_of(steps, model, optimizer, 1)]


def test_a_backward_pass_that_raised_is_not_stepped_over() -> None:
    for first, second, third in run_ranks(backward_raises, 2):
        assert first[0] == "KeyError"
        for name, message, _ in (second, third):
            assert name == SoonestError.__name__
            assert "did not finish" in message
            assert "0.weight" in message


def read_in_backward() -> tuple[str, str, float]:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    last = model[2].weight  # type: ignore[index]
    last.register_post_accumulate_grad_hook(lambda p: p.grad.norm())
    return error_of(steps, model, optimizer, 1)


def test_reading_a_gradient_inside_backward_raises() -> None:
    for name, message, _ in run_ranks(read_in_backward, 2):
        assert name == "ReadTooEarlyError"
        assert "after backward() has returned" in message


def failing_update() -> tuple[str, str, float]:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    optimizer.param_groups[0]["lr"] = "fast"
    return error_of(steps, model, optimizer, 2)


def test_an_update_that_fails_raises_in_the_loop() -> None:
    for name, message, _ in run_ranks(failing_update, 2):
        assert name == SoonestError.__name__
        assert "update" in message
