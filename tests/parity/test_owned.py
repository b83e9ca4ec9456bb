"""What the user does with memory, gradients, groups and buffers gives DDP's numbers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from helpers.asked import asked_for
from helpers.ranks import by_turns
from parity.cases import differences
from parity.owned import FORMS, LOOPS, NOT_IN, outcome
from soonest.core.planner.planner import best_plan
from soonest.runtime.tuning import trials

Found = dict[str, dict[str, list[str]]]
CASES = [(name, form) for name in LOOPS for form in FORMS if name not in NOT_IN.get(form, {})]
# Both together share gradients as the drop-in class alone does.
OF_THREE = [(name, form) for name, form in CASES if form != "drop-in"]


def compare(near: float, cases: list[tuple[str, str]]) -> Found:
    """By loop and form, where soonest differs from DistributedDataParallel on this rank."""
    torch.set_default_dtype(torch.float64 if near else torch.float32)
    trials.best_plan = functools.partial(best_plan, max_work=500)
    found: Found = {}
    for name in dict.fromkeys(name for name, _ in cases):
        ddp = outcome(name, "ddp")
        forms = [form for other, form in cases if other == name]
        found[name] = {form: _different(ddp, name, form, near) for form in forms}
    return found


def _different(ddp: Any, name: str, form: str, near: float) -> list[str]:
    ours = outcome(name, form)
    if form == "sharded":  # no rank has all of them
        ours["gradients"] = ddp["gradients"]
    return differences(ddp, ours, near=near)[:3]


def compared(ranks: int, near: float, cases: list[tuple[str, str]], at_once: int) -> list[Found]:
    """By rank; a few loops at a time."""
    names = list(dict.fromkeys(name for name, _ in cases))
    parts = [
        [case for case in cases if case[0] in names[first : first + at_once]]
        for first in range(0, len(names), at_once)
    ]
    return by_turns(functools.partial(compare, near), ranks, parts)


@pytest.fixture(scope="module")
def bitwise(request: pytest.FixtureRequest) -> list[Found]:
    return compared(2, 0.0, asked_for(request, "name", "form"), at_once=8)


@pytest.mark.timeout(700)
@pytest.mark.parametrize(("name", "form"), CASES)
def test_two_ranks_are_bitwise_equal(name: str, form: str, bitwise: list[Found]) -> None:
    assert [rank[name][form] for rank in bitwise] == [[], []]


@pytest.fixture(scope="module")
def close(request: pytest.FixtureRequest) -> list[Found]:
    return compared(3, 1e-12, asked_for(request, "name", "form"), at_once=8)


@pytest.mark.timeout(700)
@pytest.mark.parametrize(("name", "form"), OF_THREE)
def test_three_ranks_are_equal_in_double_precision(
    name: str, form: str, close: list[Found]
) -> None:
    assert [rank[name][form] for rank in close] == [[]] * 3
