"""The same numbers as DistributedDataParallel, in parameters, gradients and optimizer state."""

from __future__ import annotations

import pytest

from parity.cases import CASES, OF_FOUR, compare, repeat
from ranks import run_ranks


@pytest.fixture(scope="module")
def bitwise() -> list[dict[str, list[str]]]:
    return run_ranks(compare, 2, list(CASES), timeout_s=700)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_bitwise_equal(name: str, bitwise: list[dict[str, list[str]]]) -> None:
    assert [rank[name] for rank in bitwise] == [[], []]


@pytest.fixture(scope="module")
def close() -> list[dict[str, list[str]]]:
    return run_ranks(compare, 4, OF_FOUR, timeout_s=700)


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_ranks_are_equal_within_rounding(name: str, close: list[dict[str, list[str]]]) -> None:
    assert [rank[name] for rank in close] == [[]] * 4


def test_runs_are_bitwise_equal() -> None:
    names = ["tied transformer", "cnn with BatchNorm", "branch by rank, AdamW", "clipping"]
    for rank in run_ranks(repeat, 3, names):
        assert rank == {name: [] for name in names}
