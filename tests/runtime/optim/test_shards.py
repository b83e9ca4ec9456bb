"""Each rank keeps its part of the optimizer's state, and nothing else changes."""

from __future__ import annotations

import copy
import math
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import soonest
from helpers.equal import equal
from helpers.ranks import run_ranks
from helpers.shards import build, inputs, train
from soonest.errors import SoonestError


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def held() -> tuple[int, int, int]:
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer, shard_optimizer=True)
    train(model, optimizer, range(7))
    handle.flush()
    engine = handle._engine
    assert engine
    assert engine.state.parts
    sizes = [
        value.numel()
        for state in handle.local_optimizer_state().values()
        for name, value in state.items()
        if name.startswith("exp_avg")
    ]
    whole = optimizer.__dict__["state"]
    return sum(sizes), sum(p.numel() for p in model.parameters()), len(whole)


@pytest.mark.parametrize("n", [2, 4])
def test_every_rank_holds_its_part_of_the_state(n: int) -> None:
    found = run_ranks(held, n)
    total = found[0][1]
    assert sum(size for size, *_ in found) == 2 * total, "two moments of every element, once"
    assert max(size for size, *_ in found) < 1.2 * 2 * total / n
    assert [whole for *_, whole in found] == [0] * n, "and nothing besides"


def asks_alone() -> tuple[list[str], float]:
    model, optimizer = build()
    soonest.prioritize(model, optimizer, shard_optimizer=True)
    train(model, optimizer, range(3))
    said: list[str] = []
    began = time.monotonic()
    if dist.get_rank() == 0:
        for ask in (optimizer.state_dict, lambda: optimizer.state, lambda: copy.copy(optimizer)):
            with pytest.raises(SoonestError) as refused:
                ask()
            said.append(str(refused.value))
    took_s = time.monotonic() - began
    train(model, optimizer, range(3, 5))
    return said, took_s


def test_one_rank_that_asks_for_the_state_is_told_what_to_call() -> None:
    (said, took_s), (silent, _) = run_ranks(asks_alone, 2)
    assert not silent
    assert took_s < 20, "nobody waits for anybody"
    for sentence in said:
        assert sentence == (
            "the state of this AdamW is sharded over 2 ranks (shard_optimizer=True): call "
            "handle.optimizer_state_dict(), or handle.state_dict() for torch.distributed."
            "checkpoint, on every rank instead, which gathers it; or, where a step() asks that was "
            "kept or wrapped before prioritize, call optimizer.step() itself"
        )


def saves(sharded: bool) -> tuple[Any, Any]:
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer, shard_optimizer=sharded)
    train(model, optimizer, range(6))
    return model.state_dict(), copy.deepcopy(handle.optimizer_state_dict())


def loads(saved: tuple[Any, Any], before: bool, sharded: bool) -> bool:
    """Whether what is loaded comes out again."""
    model, optimizer = build(1)
    if before:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
    handle = soonest.prioritize(model, optimizer, shard_optimizer=sharded)
    if not before:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
    same = equal(handle.optimizer_state_dict(), saved[1])
    train(model, optimizer, range(6, 8))
    handle.detach()
    assert all(len(optimizer.state[p]) == 3 for p in model.parameters())
    return same and equal(optimizer.state_dict(), handle.optimizer_state_dict())


def test_state_moves_between_any_numbers_of_ranks() -> None:
    saved = run_ranks(saves, 4, True)
    assert all(equal(one[1], saved[0][1]) for one in saved)
    for ranks, before, sharded in ((2, True, True), (3, False, True), (2, False, False)):
        assert run_ranks(loads, ranks, saved[0], before, sharded) == [True] * ranks
    plain = run_ranks(saves, 2, False)[0]
    assert run_ranks(loads, 2, plain, False, True) == [True] * 2


def resumes(steps: tuple[int, int], saved: Any, plan: Any, sharded: bool) -> Any:
    model, optimizer = build()
    if saved is not None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))  # ranks are handed shared memory
    given = soonest.Plan.from_json(plan) if plan else None
    handle = soonest.prioritize(model, optimizer, shard_optimizer=sharded, plan=given)
    train(model, optimizer, range(*steps))
    assert handle.plan
    state = copy.deepcopy(handle.optimizer_state_dict())
    return {k: v.clone() for k, v in model.state_dict().items()}, state, handle.plan.to_json()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_a_resumed_run_ends_with_the_same_bits(n: int, sharded: bool) -> None:
    # With more than two ranks the plan decides the rounding, so it is saved along.
    plan = run_ranks(resumes, n, (0, 8), None, None, sharded)[0][2] if n > 2 else None
    whole = run_ranks(resumes, n, (0, 12), None, plan, sharded)[0]
    half = run_ranks(resumes, n, (0, 5), None, plan, sharded)[0]
    resumed = run_ranks(resumes, n, (5, 12), half[:2], plan, sharded)[0]
    assert equal(resumed[0], whole[0])
    assert equal(resumed[1], whole[1])


def clips(norm_type: float, sharded: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    norms: list[Tensor] = []
    found: list[list[Tensor]] = []
    for own in (False, True):
        model, optimizer = build()
        handle = soonest.prioritize(model, optimizer, shard_optimizer=sharded)
        options: dict[str, Any] = {"max_norm": 0.01, "norm_type": norm_type}
        train(model, optimizer, range(8), **options, **({"handle": handle} if own else {}))
        optimizer.zero_grad()
        model(inputs(9)).square().mean().backward()
        clip = handle.clip_grad_norm_ if own else None
        clip = clip or (lambda a, b, m=model: torch.nn.utils.clip_grad_norm_(m.parameters(), a, b))
        norms.append(clip(0.01, norm_type).clone())
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        found.append(parameters(model))
    return norms, *found


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_the_handle_clips_as_torch_does(norm_type: float, sharded: bool) -> None:
    first, *others = run_ranks(clips, 3, norm_type, sharded)
    for (torchs, clipped, ours, also_clipped), by_torch, by_handle in (first, *others):
        assert torch.allclose(torchs, ours, rtol=1e-5)
        assert torch.allclose(clipped, also_clipped, rtol=1e-4)
        for a, b in zip(by_torch, by_handle, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert all(equal(list(other), list(first)) for other in others)


def clips_too_early_or_too_much() -> list[str]:
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer, shard_optimizer=True)
    train(model, optimizer, range(2))
    said: list[str] = []
    with pytest.raises(SoonestError) as refused:
        handle.clip_grad_norm_(1.0)
    said.append(str(refused.value))
    optimizer.zero_grad()
    (model(inputs(0)).square().mean() * math.inf).backward()
    with pytest.raises(RuntimeError) as refused:
        handle.clip_grad_norm_(1.0, error_if_nonfinite=True)
    said.append(str(refused.value))
    return said


def test_what_cannot_be_clipped_is_refused() -> None:
    for early, much in run_ranks(clips_too_early_or_too_much, 2):
        assert "between backward() and step()" in early
        assert "cannot be clipped" in much


def reads_gradients(when: str) -> str | None:
    model, optimizer = build()
    soonest.prioritize(model, optimizer, shard_optimizer=True)
    train(model, optimizer, range(3))
    if when != "after step":
        optimizer.zero_grad()
        model(inputs(3)).square().mean().backward()
        alone = when == "on one rank" and dist.get_rank() == 1
        if not alone:
            try:
                every: list[Any] = [None] * dist.get_world_size()
                grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                if when == "before step":
                    dist.all_gather_object(every, [float(g.double().sum()) for g in grads])
                    assert every[0] == every[1]
            except SoonestError as error:
                return str(error)
        else:
            time.sleep(8)
        optimizer.step()
        return None
    try:
        _ = [float(p.grad.sum()) for p in model.parameters() if p.grad is not None]
    except SoonestError as error:
        return str(error)
    return None


def test_gradients_are_whole_before_the_step() -> None:
    assert run_ranks(reads_gradients, 2, "before step") == [None, None]


def test_reading_gradients_on_one_rank_fails_with_a_sentence() -> None:
    said = run_ranks(reads_gradients, 2, "on one rank", collective_timeout_s=3)[0]
    assert said is not None
    assert said.startswith("reading gradients could not be done on all ranks: rank 1 (host ")
    assert "under shard_optimizer=True every rank must do so, at the same point" in said


def test_gradients_in_parts_are_not_shown_after_the_step() -> None:
    for said in run_ranks(reads_gradients, 2, "after step"):
        assert said is not None
        assert "each rank has only its part of it" in said
        assert "read it before step(), on every rank" in said


def unshardable() -> tuple[list[str], bool, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(12, 8)
    optimizer = torch.optim.Adafactor(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = soonest.prioritize(model, optimizer, shard_optimizer=True)
    train(model, optimizer, range(3))
    assert handle.plan
    said = [str(warning.message) for warning in caught if "is not sharded" in str(warning.message)]
    return said, handle.plan.sharded, parameters(model)


def test_an_optimizer_that_looks_at_whole_parameters_is_not_sharded() -> None:
    for said, sharded, _ in run_ranks(unshardable, 2):
        assert said == [
            "Adafactor is not known to update each element by itself, so its state is not "
            "sharded: every rank keeps all of it"
        ]
        assert not sharded


def wired(wire: str | None, sharded: bool, method: str | None) -> tuple[list[Tensor], int]:
    model, optimizer = build()
    handle = soonest.prioritize(
        model,
        optimizer,
        shard_optimizer=sharded,
        method=method,
        wire_dtype=getattr(torch, wire) if wire else None,
    )
    train(model, optimizer, range(10))
    assert handle.plan
    return parameters(model), len(handle.plan.buckets)


@pytest.mark.parametrize(
    ("wire", "sharded", "method"),
    [
        ("bfloat16", False, None),
        ("bfloat16", True, None),
        ("bfloat16", False, "split"),
        ("float16", False, "allreduce"),
    ],
)
def test_training_with_a_narrow_wire(wire: str, sharded: bool, method: str | None) -> None:
    exact = run_ranks(wired, 2, None, sharded, method)[0][0]
    (first, _), (other, _) = run_ranks(wired, 2, wire, sharded, method)
    assert equal(first, other)
    assert not equal(first, exact), "something was rounded"
    for a, b in zip(first, exact, strict=True):
        assert torch.allclose(a, b, atol=0.05)


def rounded() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters in training and after it: ours, and those of a loop that spells it out."""
    model, optimizer = build()
    handle = soonest.prioritize(
        model, optimizer, shard_optimizer=True, parameter_wire_dtype=torch.bfloat16
    )
    twin, _ = build()
    for parameter in twin.parameters():
        parameter.grad = torch.zeros_like(parameter)
    exact, exact_optimizer = build()
    for step in range(8):
        train(model, optimizer, range(step, step + 1))
        with torch.no_grad():
            for shown, parameter in zip(twin.parameters(), exact.parameters(), strict=True):
                shown.copy_(parameter.bfloat16())
                assert shown.grad is not None
                shown.grad.zero_()
        twin(inputs(step)).square().mean().backward()
        for shown, parameter in zip(twin.parameters(), exact.parameters(), strict=True):
            assert shown.grad is not None
            parameter.grad = shown.grad / 2
            dist.all_reduce(parameter.grad)
        exact_optimizer.step()
        if step == 5:  # what the user writes counts from then on
            with torch.no_grad():
                next(model.parameters())[3:40].mul_(0.5)
                part = next(exact.parameters())[3:40]
                part.copy_(part.bfloat16() / 2)
    ours = parameters(model)
    handle.detach()
    return (
        ours,
        [p.bfloat16().float() for p in exact.parameters()],
        parameters(model),
        parameters(exact),
    )


def test_parameters_may_be_sent_rounded_and_are_kept_exactly() -> None:
    first, other = run_ranks(rounded, 2)
    assert equal(list(first), list(other))
    ours, theirs, after, exact = first
    assert equal(ours, theirs)
    assert equal(after, exact)


def detached_gradients(stepped: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients after detach(), the last of which one rank has zeroed, and those of all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 600), nn.Linear(600, 4))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = soonest.prioritize(model, optimizer, shard_optimizer=True)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    for net in (plain, model):
        net(x).square().sum().backward()
    if stepped:
        optimizer.step()
        if dist.get_rank() == 1:
            model[1].bias.grad.zero_()  # type: ignore[union-attr]
    handle.detach()
    for p in plain.parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    if stepped and dist.get_rank() == 1:
        plain[1].bias.grad.zero_()  # type: ignore[union-attr]
    return [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("stepped", [False, True])
def test_detach_leaves_whole_gradients(stepped: bool) -> None:
    for ours, right in run_ranks(detached_gradients, 2, stepped):
        for one, other in zip(ours, right, strict=True):
            assert torch.equal(one, other)
