"""Plans that are saved, given again, and refused where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import soonest
from helpers.ranks import run_ranks


def build(*, width: int = 3, dtype: torch.dtype = torch.float32, more: bool = False) -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(3, width), nn.Linear(width, 2), *([nn.Linear(2, 2)] if more else [])]
    model = nn.Sequential(*layers).to(dtype)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3) * (dist.get_rank() + 1)).square().sum().backward()
        optimizer.step()


def saves(path: str, sharded: bool) -> tuple[list[str], list[torch.Tensor], bool]:
    """Trains with a plan that is learned, and then on with it."""
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer, shard_optimizer=sharded)
    while not handle.settled:
        train(model, optimizer, 1)
    assert handle.plan is not None
    fingerprints = [handle.plan.fingerprint]
    if dist.get_rank() == 0:
        handle.save_plan(path)
    handle.detach()
    dist.barrier()
    with pytest.raises(ValueError, match="there is no plan to save"):
        handle.save_plan(path)
    again = soonest.prioritize(model, optimizer, plan=path, shard_optimizer=sharded)
    settled = again.settled
    for _ in range(2):
        assert again.plan is not None
        fingerprints.append(again.plan.fingerprint)
        train(model, optimizer, 8)
    again.flush()
    return fingerprints, [p.detach().clone() for p in model.parameters()], settled


@pytest.mark.parametrize("sharded", [False, True])
def test_a_saved_plan_is_kept_to(sharded: bool, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    (prints, values, settled), (others, same, _) = run_ranks(saves, 2, str(file), sharded)
    assert len(set(prints)) == 1
    assert prints == others
    assert all(torch.equal(a, b) for a, b in zip(values, same, strict=True))
    assert settled
    assert list(tmp_path.iterdir()) == [file], "nothing else is left"
    assert soonest.Plan.from_json(json.loads(file.read_text())).fingerprint == prints[0]


def repeats(path: str) -> list[torch.Tensor]:
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer, plan=path)
    assert handle.plan is not None
    assert handle.plan.blocking == path.endswith("waiting.json")
    train(model, optimizer, 5)
    handle.flush()
    return [p.detach().clone() for p in model.parameters()]


def writes(folder: str) -> None:
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer)
    train(model, optimizer, 1)
    if dist.get_rank() == 0:
        handle.save_plan(f"{folder}/plan.json")


def refused(change: dict[str, Any], plan: str) -> str:
    model, optimizer = build(**change)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        soonest.prioritize(model, optimizer, plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert type(optimizer) is torch.optim.SGD
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    run_ranks(writes, 2, str(folder))
    return folder / "plan.json"


def test_a_waiting_plan_gives_the_same_numbers(saved: Path) -> None:
    plan = soonest.Plan.from_json(json.loads(saved.read_text()))
    waiting = saved.with_name("waiting.json")
    waiting.write_text(json.dumps(replace(plan, blocking=not plan.blocking).to_json()))
    one, other = (run_ranks(repeats, 2, str(file))[0] for file in (saved, waiting))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 4}, "parameter '0.weight' has 9 elements of float32 there, and 12"),
        ({"dtype": torch.float64}, "float32 there, and 9 elements of float64 here"),
        ({"more": True}, "it does not send parameter '2.weight', which is trained here"),
    ],
)
def test_a_plan_for_another_model_is_refused(
    change: dict[str, Any], message: str, saved: Path
) -> None:
    for said in run_ranks(refused, 2, change, str(saved)):
        assert said.startswith("the plan is not for this model and group: ")
        assert message in said
        assert said.endswith("one that was saved with this model on as many ranks")
        assert "\n" not in said


def test_a_plan_for_a_larger_model_is_refused(saved: Path, tmp_path: Path) -> None:
    text = saved.read_text().replace('"1.weight"', '"head.weight"')
    other = tmp_path / "plan.json"
    other.write_text(text)
    for said in run_ranks(refused, 2, {}, str(other)):
        assert "it sends parameter 'head.weight', which is not trained here" in said


def test_a_plan_for_another_number_of_ranks_is_refused(saved: Path) -> None:
    for said in run_ranks(refused, 3, {}, str(saved)):
        assert "it is for 2 ranks, and here are 3" in said


def refused_where(folder: str, how: str) -> str:
    """What is said if only the second rank cannot read its plan."""
    second = dist.get_rank() == 1
    return refused({}, f"{folder}/{how}.json" if second else f"{folder}/plan.json")


BROKEN = {
    "absent": "No such file or directory",
    "garbled": "holds no plan",
    "a list": "this is no plan: it is a JSON list, not an object",
    "a fragment": "this is no plan: 'ops'",
    "of tomorrow": "plan of format 99, this version reads 1",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_plan_that_one_rank_cannot_read_is_refused_by_all(how: str, saved: Path) -> None:
    plan = json.loads(saved.read_text())
    contents = {
        "garbled": saved.read_text()[:100],
        "a list": "[1]",
        "a fragment": json.dumps({key: plan[key] for key in plan if key != "ops"}),
        "of tomorrow": json.dumps({**plan, "format": 99}),
    }
    if how in contents:
        saved.with_name(f"{how}.json").write_text(contents[how])
    first, second = run_ranks(refused_where, 2, str(saved.parent), how)
    assert first == f"rank 1: {second}"
    assert BROKEN[how] in second
    assert f"{how}.json" in second
    assert "\n" not in second


def other_plans(path: str) -> str:
    """What is said if the ranks give different plans."""
    model, optimizer = build()
    plan = soonest.Plan.from_json(json.loads(Path(path).read_text()))
    if dist.get_rank() == 1:
        plan = replace(plan, blocking=not plan.blocking)
    with pytest.raises(soonest.PlanMismatchError) as error:
        soonest.prioritize(model, optimizer, plan=plan)
    return str(error.value)


def test_ranks_with_different_plans_say_so(saved: Path) -> None:
    for said in run_ranks(other_plans, 2, str(saved)):
        assert "first difference between rank 0 and rank 1: blocking: False / True" in said


def alone() -> str:
    model, optimizer = build()
    with pytest.raises(ValueError) as error:
        soonest.prioritize(model, optimizer, plan="/nowhere/plan.json")
    return str(error.value)


def test_a_single_rank_reads_its_plan_too() -> None:
    assert run_ranks(alone, 1) == [
        "cannot read plan '/nowhere/plan.json': No such file or directory"
    ]
