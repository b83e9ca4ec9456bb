"""A rank that is lost, late or different becomes an error on the others, and nothing hangs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import soonest
from helpers.failing import (
    ODD,
    SHORT_S,
    TIMEOUT_S,
    Run,
    Runs,
    Said,
    backward,
    end,
    error_of,
    in_training,
    left,
    meets_again,
    model_and_optimizer,
    odd,
    started,
    steps,
    told,
)
from helpers.ranks import say_done, wait_for_the_others
from helpers.steering import keep_to_the_usual_plan
from soonest import PeerLostError, PlanMismatchError, SoonestError
from soonest.runtime.comm import connections, failures
from soonest.runtime.tuning import autotuner, calibrate

# Losses: all others raise one error that says who is missing, and what for


def lost_in_training(how: str, timeout_s: float | None, sharded: bool) -> tuple[Said, ...] | None:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer, timeout_s=timeout_s, shard_optimizer=sharded)
    steps(model, optimizer, 7)
    if odd():
        end(how)
        return None
    return told(error_of(steps, model, optimizer, 1000))


def lost_for_good(form: str) -> tuple[Said, ...] | None:
    """Nothing but the end of its connections can tell that a rank is lost: all else takes long."""
    failures._GRACE_S = failures._BROKEN_S = TIMEOUT_S
    model, optimizer = model_and_optimizer()
    net: nn.Module = model
    if form == "drop-in":
        net = soonest.DistributedDataParallel(model)
    else:
        soonest.prioritize(model, optimizer, shard_optimizer=form == "sharded")
    steps(net, optimizer, 7)
    if odd():
        end("killed")
    return told(error_of(steps, net, optimizer, 1000))


def lost_beside_buffers() -> tuple[Said, ...] | None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    if odd():
        end("killed")
    return told(error_of(steps, model, optimizer, 1000))


def lost_in_planning(how: str, timeout_s: float | None) -> tuple[Said, ...] | None:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer, timeout_s=timeout_s)
    if odd():
        autotuner.AutoTuner._first_rank = lambda *_: end(how)  # type: ignore[method-assign]
    return told(error_of(steps, model, optimizer, 1000))


def lost_in_prioritize() -> tuple[Said, ...] | None:
    if odd():
        calibrate.network_of = lambda *_, **__: end("killed")  # type: ignore[assignment]
    model, optimizer = model_and_optimizer()
    return told(error_of(soonest.prioritize, model, optimizer))


def lost_before_a_shared_call() -> tuple[Said, ...] | None:
    _model, _optimizer, handle = in_training(shard_optimizer=True)
    if odd():
        end("leaves")
    return told(error_of(handle.optimizer_state_dict))


def never_comes() -> tuple[Said, ...] | None:
    model, optimizer = model_and_optimizer()
    if odd():
        end("sleeps")
        return None
    return told(error_of(soonest.prioritize, model, optimizer, timeout_s=SHORT_S))


def one_pass_more() -> tuple[Said, ...] | None:
    """Seen from the other side: all others are missing."""
    model, optimizer = model_and_optimizer()
    handle = soonest.prioritize(model, optimizer, timeout_s=SHORT_S)
    steps(model, optimizer, 7)
    handle.flush()
    if not odd():
        say_done()
        wait_for_the_others()
        return None
    backward(model)
    return told(error_of(handle.flush))


def skips_a_step() -> tuple[Said, ...] | None:
    """In the middle of training; who has gone on without it is found missing at the end."""
    model, optimizer, handle = in_training(timeout_s=SHORT_S)
    handle.engine.after_step = lambda _: None  # type: ignore[union-attr]

    def rest() -> None:
        for number in range(3):
            if number != 1 or not odd():
                steps(model, optimizer, 1)
        handle.flush()

    if odd():
        rest()
        end("sleeps")
        return None
    return told(error_of(rest))


def one_step_less() -> tuple[Said, ...]:
    """A backward pass that one rank does not follow by ``step()``, while plans are made."""
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer, timeout_s=SHORT_S)
    if odd():
        backward(model)
    return meets_again(error_of(steps, model, optimizer, 1000))


# Faults: one rank cannot go on, and the others are told why long before the timeout


def refuses(options: dict[str, Any], build: Callable[..., Any]) -> tuple[Said, ...]:
    model, optimizer = build() if odd() else model_and_optimizer()
    return told(error_of(soonest.prioritize, model, optimizer, **(options if odd() else {})))


def sparse_module() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def foreign_parameter() -> tuple[nn.Module, torch.optim.Optimizer]:
    model, _ = model_and_optimizer()
    return model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x.argmax(1))


def sparse_later() -> tuple[Said, ...]:
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    model.embed.sparse = odd()
    return meets_again(error_of(steps, model, optimizer, 1000))


def update_fails(at_once: bool) -> tuple[Said, ...]:
    model, optimizer = model_and_optimizer()
    keep_to_the_usual_plan()
    soonest.prioritize(model, optimizer, separable=not at_once)
    steps(model, optimizer, 7)
    if odd():
        optimizer.param_groups[0]["lr"] = "fast"
    return meets_again(error_of(steps, model, optimizer, 1000))


def other_dtype() -> tuple[Said, ...]:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    if odd():
        model.double()
        model.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return meets_again(error_of(steps, model, optimizer, 1000))


# Differences


def other_model() -> Said:
    model, optimizer = model_and_optimizer(width=64 + odd())
    return error_of(soonest.prioritize, model, optimizer)


def other_plan() -> Said:
    model, optimizer = model_and_optimizer()
    handle = soonest.prioritize(model, optimizer)
    steps(model, optimizer, 2)
    plan = handle.plan
    assert plan is not None
    handle.detach()
    if odd():
        plan = soonest.Plan(plan.ranks, plan.flats, plan.buckets, plan.ops, window=3)
    return error_of(soonest.prioritize, model, optimizer, plan=plan)


def other_wish() -> Said:
    model, optimizer = model_and_optimizer()
    return error_of(soonest.prioritize, model, optimizer, method="gather" if odd() else None)


# Afterwards


def after_a_loss() -> list[str]:
    model, optimizer = model_and_optimizer()
    handle = soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    if odd():
        os._exit(1)
    errors = [
        error_of(steps, model, optimizer, 1000).name,
        error_of(steps, model, optimizer, 1).name,
        error_of(handle.flush).name,
    ]
    handle.detach()
    assert all(p.isfinite().all() for p in model.parameters())
    steps(model, optimizer, 2)  # alone
    return errors


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raise KeyError("boom")


def backward_raises() -> list[Said]:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)

    def fail() -> None:
        hidden = Boom.apply(model[0](torch.randn(4, 8)))
        model[2](torch.relu(hidden)).sum().backward()

    return [error_of(fail), error_of(optimizer.step), error_of(steps, model, optimizer, 1)]


def read_in_backward() -> Said:
    """A gradient is read whose bucket cannot be combined yet, as it lacks another."""
    model, optimizer = model_and_optimizer()
    keep_to_the_usual_plan()
    handle = soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    assert handle.plan
    last = handle.plan.flats[0].slots[-2:]
    assert {slot.name for slot in last} == {"2.weight", "2.bias"}
    assert any(b.start <= last[0].start and b.stop > last[1].start for b in handle.plan.buckets)

    def read(_: Any) -> None:
        assert model[2].bias.grad is not None
        model[2].bias.grad.norm()

    model[2].weight.register_post_accumulate_grad_hook(read)
    return error_of(steps, model, optimizer, 1)


def at_places(*places: str) -> str | None:
    """Each rank waits for something of its own, and nobody is lost."""
    ranks = failures.FailureReporter(dist.group.WORLD)
    return ranks.blame(places[dist.get_rank()], True)


def store_goes() -> tuple[Said, ...] | None:
    """The host of the store ends when it knows who is lost; another rank is only finding out."""
    model, optimizer = model_and_optimizer()
    handle = soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    if odd():
        end("killed")
    if dist.get_rank() == 2:
        ended = connections.Known.ended

        def slowly(known: connections.Known, ranks: Any) -> Any:
            time.sleep(0.5)
            return ended(known, ranks)

        connections.Known.ended = slowly
    found = error_of(steps, model, optimizer, 1000)
    if dist.get_rank() == 0:
        assert handle.engine is not None
        handle.engine.failures.wait_for_notes()
        os._exit(0)
    return (found,)


RUNS = {
    "killed": Run(lost_in_training, 4, ("killed", None, False)),
    "leaves": Run(lost_in_training, 3, ("leaves", None, False)),
    "store goes": Run(store_goes, 3, first_has_store=True),
    "two in one step": Run(
        at_places, 3, ("step 5: bucket 0", "step 5: sending buffers", "gathering")
    ),
    "all in one step": Run(at_places, 2, ("step 5: bucket 0", "step 5: sending buffers")),
    "in no step": Run(at_places, 2, ("gathering", "saving")),
    "stops": Run(lost_in_training, 3, ("stops", SHORT_S, False)),
    "sleeps": Run(lost_in_training, 3, ("sleeps", SHORT_S, False)),
    "killed while sharing": Run(lost_in_training, 3, ("killed", None, True)),
    "stops while sharing": Run(lost_in_training, 3, ("stops", SHORT_S, True)),
    "killed for good, plain": Run(lost_for_good, 3, ("plain",)),
    "killed for good, sharded": Run(lost_for_good, 3, ("sharded",)),
    "killed for good, drop-in": Run(lost_for_good, 3, ("drop-in",)),
    "killed beside buffers": Run(lost_beside_buffers, 3),
    "killed while planning": Run(lost_in_planning, 3, ("killed", None)),
    "stops while planning": Run(lost_in_planning, 3, ("stops", SHORT_S)),
    "killed in prioritize": Run(lost_in_prioritize, 3),
    "before a shared call": Run(lost_before_a_shared_call, 3),
    "never comes": Run(never_comes, 3),
    "one pass more": Run(one_pass_more, 3),
    "skips a step": Run(skips_a_step, 3),
    "one step less": Run(one_step_less, 3),
    "bad option": Run(refuses, 3, ({"method": "pigeon"}, model_and_optimizer)),
    "sparse module": Run(refuses, 3, ({}, sparse_module)),
    "foreign parameter": Run(refuses, 3, ({}, foreign_parameter)),
    "sparse gradient": Run(sparse_later, 3),
    "failing update": Run(update_fails, 3, (False,)),
    "failing step": Run(update_fails, 3, (True,)),
    "other dtype": Run(other_dtype, 3),
    "other model": Run(other_model, 3),
    "other plan": Run(other_plan, 2),
    "other wish": Run(other_wish, 2),
    "after a loss": Run(after_a_loss, 2),
    "backward raises": Run(backward_raises, 2),
    "read in backward": Run(read_in_backward, 2),
}


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    yield from started(RUNS)


LOST_IN_TRAINING = [name for name, run in RUNS.items() if run.function is lost_in_training]
LOST_IN_PLANNING = [name for name, run in RUNS.items() if run.function is lost_in_planning]


@pytest.mark.parametrize("form", ["plain", "sharded", "drop-in"])
def test_a_rank_is_lost_as_soon_as_no_connection_to_it_stands(form: str, runs: Runs) -> None:
    for said in left(runs[f"killed for good, {form}"].result()):
        assert said.name == PeerLostError.__name__
        assert re.search(r"rank 1 \(host [^)]*\) did not take part", said.message)
        assert said.took_s < TIMEOUT_S / 2


@pytest.mark.parametrize("how", LOST_IN_TRAINING)
def test_a_rank_that_is_lost_is_named_with_what_is_waited_for(how: str, runs: Runs) -> None:
    for said in left(runs[how].result()):
        assert said.name == PeerLostError.__name__
        assert "rank 1 (host " in said.message
        assert "did not take part" in said.message
        assert re.match(r"step [67]: bucket \d+ \([\d.]+ MB of [02](, [02])?\) ", said.message)
        assert "rank 0 (" not in said.message
        assert "rank 2 (" not in said.message
        assert "\n" not in said.message
        assert said.took_s < TIMEOUT_S


def test_ranks_in_the_same_step_do_not_blame_each_other(runs: Runs) -> None:
    first, second, third = runs["two in one step"].result()
    assert first == second
    assert "rank 2 (" in first
    assert "rank 1 (" not in first
    assert "rank 0 (" in third
    assert "rank 1 (" in third
    assert "rank 1 (" in runs["all in one step"].result()[0]
    assert "rank 1 (" in runs["in no step"].result()[0]


def test_the_store_stays_until_all_know_who_is_lost(runs: Runs) -> None:
    first, lost, (said,) = runs["store goes"].result()
    assert first is lost is None
    assert said.name == PeerLostError.__name__
    assert "rank 1 (host " in said.message
    assert "rank 0 (" not in said.message


def test_a_rank_that_skips_a_step_is_named_with_what_is_waited_for(runs: Runs) -> None:
    for said in left(runs["skips a step"].result()):
        assert said.name == PeerLostError.__name__
        assert re.match(r"step \d+: bucket \d+ \([\d.]+ MB of [02](, [02])?\) ", said.message)
        assert "rank 1 (host " in said.message
        assert "rank 0 (" not in said.message
        assert "rank 2 (" not in said.message


def test_a_rank_that_is_lost_with_its_buffers_is_named(runs: Runs) -> None:
    for said in left(runs["killed beside buffers"].result()):
        assert said.name == PeerLostError.__name__
        assert "rank 1 (host " in said.message
        assert "did not take part" in said.message


@pytest.mark.parametrize("how", LOST_IN_PLANNING)
def test_a_rank_that_is_lost_in_planning_is_named(how: str, runs: Runs) -> None:
    for said in left(runs[how].result()):
        assert said.name == PeerLostError.__name__
        assert said.message.startswith("what follows step 0, as planning")
        assert "rank 1 (host " in said.message
        assert said.took_s < TIMEOUT_S


def test_a_rank_that_is_lost_in_prioritize_is_named(runs: Runs) -> None:
    for said in left(runs["killed in prioritize"].result()):
        assert said.name == PeerLostError.__name__
        assert said.message.startswith("prioritize() could not be done on all ranks: rank 1 (host")


def test_a_rank_that_is_lost_before_a_shared_call_is_named(runs: Runs) -> None:
    for said in left(runs["before a shared call"].result()):
        assert said.name == PeerLostError.__name__
        assert said.message.startswith("gathering the optimizer's state could not be done")
        assert "rank 1 (host " in said.message


def test_a_rank_that_does_not_call_prioritize_is_named(runs: Runs) -> None:
    for said in left(runs["never comes"].result()):
        assert said.name == PeerLostError.__name__
        assert said.message.startswith("prioritize() could not connect the ranks: rank 1 did not")


def test_a_backward_pass_that_others_do_not_run_ends_in_an_error(runs: Runs) -> None:
    first, (said,), third = runs["one pass more"].result()
    assert first is third is None
    assert said.name == PeerLostError.__name__
    assert "step 7: bucket " in said.message
    assert "rank 0 (host " in said.message
    assert "and rank 2 (host " in said.message


def test_ranks_at_different_points_say_where_they_are(runs: Runs) -> None:
    for rank, (said,) in enumerate(runs["one step less"].result()):
        assert said.name == PeerLostError.__name__
        if rank != ODD:
            assert said.message.startswith("what follows step 0, as planning")
            assert "the ranks are at different points: rank 1 (host " in said.message
            assert "waits for step " in said.message


REFUSED = {
    "bad option": "no method 'pigeon': there are ",
    "sparse module": "module '0' produces sparse gradients",
    "foreign parameter": "the optimizer holds a parameter that is not the model's",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_one_rank_refuses_is_refused_on_all(what: str, runs: Runs) -> None:
    for rank, (said,) in enumerate(runs[what].result()):
        assert said.name == ValueError.__name__
        assert said.message.startswith(("" if rank == ODD else "rank 1: ") + REFUSED[what])
        assert said.took_s < TIMEOUT_S


FAULTS = {
    "sparse gradient": ("ValueError", "the gradient of 'embed.weight' is sparse"),
    "failing update": ("SoonestError", "an update failed: TypeError("),
    "failing step": ("TypeError", "bad operand type for unary -"),
    "other dtype": ("SoonestError", " is float64 (64, 8) on cpu now, but was float32"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_the_others_are_told_what_is_wrong_with_one_rank(what: str, runs: Runs) -> None:
    name, text = FAULTS[what]
    for rank, (said,) in enumerate(runs[what].result()):
        assert text in said.message
        if rank == ODD:
            assert said.name == name
        else:
            assert said.name == PeerLostError.__name__
            assert "bucket " in said.message
            assert "rank 1 (host " in said.message
            assert " failed: " in said.message
        assert said.took_s < TIMEOUT_S


def test_another_model_is_named(runs: Runs) -> None:
    for name, message, _ in runs["other model"].result():
        assert name == PlanMismatchError.__name__
        assert "parameter 0 is 0.weight (64, 8)" in message
        assert "(65, 8)" in message
        assert "rank 1" in message


def test_another_plan_is_named(runs: Runs) -> None:
    for name, message, _ in runs["other plan"].result():
        assert name == PlanMismatchError.__name__
        assert "between rank 0 and rank 1: " in message
        assert "window: 2 / 3" in message


def test_another_wish_is_named(runs: Runs) -> None:
    for name, message, took_s in runs["other wish"].result():
        assert name == PlanMismatchError.__name__
        assert "method is None on rank 0 and gather on rank 1" in message
        assert took_s < TIMEOUT_S


def test_after_a_loss_everything_raises_until_detached(runs: Runs) -> None:
    survivor, dead = runs["after a loss"].result()
    assert dead is None
    assert survivor == ["PeerLostError"] * 3


def test_a_backward_pass_that_raised_is_not_stepped_over(runs: Runs) -> None:
    for first, second, third in runs["backward raises"].result():
        assert first.name == "KeyError"
        for name, message, _ in (second, third):
            assert name == SoonestError.__name__
            assert "did not finish" in message
            assert "0.weight" in message


def test_reading_a_gradient_inside_backward_raises(runs: Runs) -> None:
    for name, message, _ in runs["read in backward"].result():
        assert name == "ReadTooEarlyError"
        assert "after backward() has returned" in message
