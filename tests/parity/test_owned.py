"""What the user does with memory, gradients, groups and buffers gives DDP's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parity.cases import differences
from parity.owned import FORMS, LOOPS, NOT_IN, outcome
from ranks import run_ranks

Found = dict[str, dict[str, list[str]]]
CASES = [(name, form) for name in LOOPS for form in FORMS if name not in NOT_IN.get(form, {})]


def compare(near: float, names: list[str]) -> Found:
    """By loop and form, where soonest differs from DistributedDataParallel on this rank."""
    torch.set_default_dtype(torch.float64 if near else torch.float32)
    found: Found = {}
    for name in names:
        ddp = outcome(name, "ddp")
        found[name] = {}
        for form in FORMS:
            if (name, form) in CASES:
                found[name][form] = _different(ddp, name, form, near)
    return found


def _different(ddp: Any, name: str, form: str, near: float) -> list[str]:
    ours = outcome(name, form)
    if form == "sharded":  # no rank has all of them
        ours["gradients"] = ddp["gradients"]
    return differences(ddp, ours, near=near)[:3]


@pytest.fixture(scope="module")
def bitwise() -> list[Found]:
    return run_ranks(compare, 2, 0.0, list(LOOPS), timeout_s=600)


@pytest.mark.timeout(700)
@pytest.mark.parametrize(("name", "form"), CASES)
def test_two_ranks_are_bitwise_equal(name: str, form: str, bitwise: list[Found]) -> None:
    assert [rank[name][form] for rank in bitwise] == [[], []]


@pytest.fixture(scope="module")
def close() -> list[Found]:
    return run_ranks(compare, 3, 1e-12, list(LOOPS), timeout_s=600)


@pytest.mark.timeout(700)
@pytest.mark.parametrize(("name", "form"), CASES)
def test_three_ranks_are_equal_in_double_precision(
    name: str, form: str, close: list[Found]
) -> None:
    assert [rank[name][form] for rank in close] == [[]] * 3
