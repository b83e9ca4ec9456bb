"""The same numbers as DistributedDataParallel, in parameters, gradients and optimizer state."""

from __future__ import annotations

import pytest
from torch import optim

from helpers.asked import asked_for
from helpers.ranks import by_turns, run_ranks
from parity.cases import CASES, OF_FOUR, STEPS, compare, repeat
from parity.loops import SCHEDULERS
from parity.page import PAGE, page

AT_ONCE = 11
"""Cases that the same processes train."""


def compared(ranks: int, names: list[str]) -> list[dict[str, list[str]]]:
    """By rank, where each case differs.

    Cases stay in their order, so that those that compile, which takes seconds to import, go
    together.
    """
    firsts = range(0, len(names), AT_ONCE)
    return by_turns(compare, ranks, [names[first : first + AT_ONCE] for first in firsts])


@pytest.fixture(scope="module")
def bitwise(request: pytest.FixtureRequest) -> list[dict[str, list[str]]]:
    return compared(2, asked_for(request, "name"))


@pytest.mark.timeout(800)  # the first of them trains all
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_bitwise_equal(name: str, bitwise: list[dict[str, list[str]]]) -> None:
    assert [rank[name] for rank in bitwise] == [[], []]


@pytest.fixture(scope="module")
def close(request: pytest.FixtureRequest) -> list[dict[str, list[str]]]:
    return compared(4, asked_for(request, "name"))


@pytest.mark.timeout(800)
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_ranks_are_equal_within_rounding(name: str, close: list[dict[str, list[str]]]) -> None:
    assert [rank[name] for rank in close] == [[]] * 4


def test_runs_are_bitwise_equal() -> None:
    names = ["tied transformer", "cnn with BatchNorm", "branch by rank, AdamW", "clipping"]
    for rank in run_ranks(repeat, 3, names):
        assert rank == {name: [] for name in names}


def test_every_optimizer_and_scheduler_of_torch_has_a_case() -> None:
    cases = [case for case in CASES.values() if case.loop is None]
    compared = {type(case.optimizer(case.model())) for case in cases}
    known = {getattr(optim, name) for name in optim.__all__}
    known = {one for one in known if isinstance(one, type) and issubclass(one, optim.Optimizer)}
    # The one takes sparse gradients only, which are refused.
    assert known - compared == {optim.Optimizer, optim.SparseAdam}
    schedulers = {getattr(optim.lr_scheduler, name) for name in optim.lr_scheduler.__all__}
    assert schedulers - set(SCHEDULERS) == {optim.lr_scheduler.LRScheduler}


def test_runs_are_long_enough() -> None:
    assert STEPS >= 30


def test_the_page_shows_these_cases() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
