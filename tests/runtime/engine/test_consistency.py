"""``SOONEST_CHECK`` finds ranks that no longer train the same model, and costs nothing when off."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import soonest
from helpers.ranks import run_ranks
from soonest.errors import PlanMismatchError, SoonestError
from soonest.runtime.engine import consistency
from soonest.runtime.handle import Handle


def build(*, sharded: bool = False) -> tuple[nn.Sequential, torch.optim.Optimizer, Handle]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))
    model[2].bias.requires_grad_(not sharded)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return model, optimizer, soonest.prioritize(model, optimizer, shard_optimizer=sharded)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 8) + dist.get_rank()).square().sum().backward()
        optimizer.step()


def nudge(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():  # by the smallest step there is
        weight = model[2].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


def nudge_moment(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model[0].bias]["max_exp_avg_sq"] = torch.ones(64)  # Adam does not use it


def other_rate(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.3


def one_pass(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().sum().backward()


def one_step(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    one_pass(model, optimizer)
    if dist.get_rank() != 1:
        optimizer.step()


def nothing(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None: ...


PERTURBED: dict[str, tuple[Callable[..., None], str]] = {
    "a weight": (nudge, "after step 9 parameter '2.weight' differs between the ranks"),
    "a moment": (nudge_moment, "after step 9 the optimizer's state of '0.bias' differs between"),
    "a rate": (other_rate, "The optimizer's settings in group 0 differ, too."),
    "a pass": (one_pass, ": 9 backward passes, 9 steps on ranks 0 and 2, 9 backward passes, 8 "),
    "a step": (one_step, ": 9 backward passes, 9 steps on ranks 0 and 2, 9 backward passes, 8 "),
}


def compared() -> dict[str, tuple[str, str]]:
    """What was raised after one rank had done something else before the seventh step."""
    found: dict[str, tuple[str, str]] = {}
    os.environ[consistency.VARIABLE] = "3"
    for name, (perturb, _) in {**PERTURBED, "nothing": (nothing, "")}.items():
        model, optimizer, handle = build()
        steps(model, optimizer, 6)
        if dist.get_rank() == 1 or perturb is one_step:
            perturb(model, optimizer)
        try:
            steps(model, optimizer, 6)
            found[name] = ("", "")
        except SoonestError as error:
            found[name] = (type(error).__name__, str(error))
        handle.detach()
    return found


@pytest.fixture(scope="module")
def three() -> list[dict[str, tuple[str, str]]]:
    return run_ranks(compared, 3)


@pytest.mark.parametrize("what", PERTURBED)
def test_what_differs_is_named_on_every_rank(
    what: str, three: list[dict[str, tuple[str, str]]]
) -> None:
    for rank in three:
        name, message = rank[what]
        assert name == "SoonestError"
        assert PERTURBED[what][1] in message
        assert "on ranks 0 and 2, " in message
        assert " on rank 1" in message
        assert "\n" not in message
    assert len({rank[what] for rank in three}) == 1


def test_nothing_is_raised_where_nothing_differs(
    three: list[dict[str, tuple[str, str]]],
) -> None:
    assert [rank["nothing"] for rank in three] == [("", "")] * 3


def compared_in_parts() -> str:
    """With the optimizer's state shared out; the cheap and the long way to say how often."""
    os.environ[consistency.VARIABLE] = "on"
    model, optimizer, _ = build(sharded=True)
    steps(model, optimizer, 11)
    if dist.get_rank() == 1:  # what is trained, its owner would give everybody again
        model[2].bias[0] = 3.0
    with pytest.raises(SoonestError) as raised:
        steps(model, optimizer, 9)
    return str(raised.value)


def test_parameters_are_compared_where_the_state_is_shared_out() -> None:
    one, other = run_ranks(compared_in_parts, 2)
    assert one == other
    assert "after step 20 parameter '2.bias' differs between the ranks: " in one
    assert "on rank 0, " in one


def asked_differently() -> tuple[str, str]:
    said: list[str] = []
    for value, error in (
        ("5" if dist.get_rank() else "", PlanMismatchError),
        ("often", ValueError),
    ):
        os.environ[consistency.VARIABLE] = value
        with pytest.raises(error) as raised:
            build()
        said.append(str(raised.value))
    return said[0], said[1]


def test_ranks_that_ask_differently_are_refused() -> None:
    for differs, unreadable in run_ranks(asked_differently, 2):
        assert "SOONEST_CHECK is 0 on rank 0 and 5 on rank 1" in differs
        assert unreadable == (
            "SOONEST_CHECK is 'often', but must be a number of steps, or on for every 10th, or off"
        )


@pytest.mark.parametrize(
    ("text", "steps"), [("", 0), ("0", 0), ("off", 0), ("1", 1), ("on", 10), ("25", 25)]
)
def test_how_often(text: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(consistency.VARIABLE, text)
    assert consistency.interval() == steps


def off() -> list[Any]:
    model, optimizer, handle = build()
    assert handle.engine
    step = handle.engine.after_step
    consistency.checksum = lambda tensor: pytest.fail("something was compared")
    steps(model, optimizer, 12)
    cells = [cell.cell_contents for cell in step.__closure__ or ()]  # type: ignore[attr-defined]
    return [type(cell).__name__ for cell in cells]


def test_it_costs_nothing_when_off() -> None:
    for rank in run_ranks(off, 2):
        assert "AutoTuner" in rank
        assert "Comparison" not in rank


BITS = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_a_checksum_depends_on_every_bit_and_its_place(dtype: torch.dtype) -> None:
    tensor = torch.arange(70_000).reshape(700, 100).remainder(2).to(dtype)
    first = consistency.checksum(tensor)
    assert consistency.checksum(tensor.clone()) == first
    assert consistency.checksum(tensor.T.contiguous().T) == first, "not on strides"
    for at in ((0, 0), (699, 99), (350, 7)):
        changed = tensor.clone()
        changed[at] = 1 - changed[at].to(torch.int64)
        assert consistency.checksum(changed) != first
    assert consistency.checksum(tensor.roll(1)) != first
    assert consistency.checksum(tensor[:-1]) != first


def test_a_checksum_tells_zeros_apart_and_knows_nan() -> None:
    zero, nan = torch.zeros(3), torch.full((3,), float("nan"))
    assert consistency.checksum(zero) != consistency.checksum(-zero)
    assert consistency.checksum(nan) == consistency.checksum(nan.clone())
    assert consistency.checksum(torch.zeros(())) != consistency.checksum(torch.zeros(0))


def test_a_checksum_depends_on_the_order_of_large_pieces() -> None:
    half = consistency._CHUNK
    tensor = torch.arange(2 * half)
    swapped = torch.cat([tensor[half:], tensor[:half]])
    assert consistency.checksum(tensor) != consistency.checksum(swapped)


def test_a_checksum_depends_on_both_parts_of_complex_numbers() -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    assert consistency.checksum(numbers) != consistency.checksum(numbers.conj().resolve_conj())
