"""What a run says of itself, where the environment asks for it."""

import io
import logging
import os
import sys

import pytest
import torch

import soonest
from helpers.ranks import run_ranks
from helpers.steering import net
from soonest import logs


def lines_of(level: str) -> list[str]:
    """What a training logs from ``prioritize`` until its plan is selected."""
    os.environ[logs.VARIABLE] = level
    sys.stderr = written = io.StringIO()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = soonest.prioritize(model, optimizer)
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    handle.detach()
    return written.getvalue().splitlines()


def test_the_first_rank_tells_what_was_chosen_in_at_most_ten_lines() -> None:
    both = run_ranks(lines_of, 2, "info")
    # Where the machine is busy, a rank may also warn that another is late.
    first, second = ([line for line in lines if " WARNING: " not in line] for lines in both)
    assert 2 <= len(first) <= 10
    assert all(" soonest rank 0 INFO: " in line for line in first)
    assert "ranks: " in first[0]
    assert " parameters, " in first[0]
    assert second == []


def test_every_rank_tells_everything_if_asked_to() -> None:
    first, second = run_ranks(lines_of, 2, "debug")
    for rank, lines in enumerate((first, second)):
        assert any(f" soonest rank {rank} DEBUG: the plan is now " in line for line in lines)


def test_a_level_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "loud")
    with pytest.raises(ValueError, match="SOONEST_LOG is 'loud', but must be one of debug, info"):
        logs.level()


def test_the_user_s_own_handlers_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    top, mine = logging.getLogger("soonest"), logging.NullHandler()
    before = top.level
    monkeypatch.setenv(logs.VARIABLE, "info")
    top.addHandler(mine)
    try:
        logs.follow_environment(0)
        assert top.handlers == [mine]
        assert top.level == logging.INFO
    finally:
        top.removeHandler(mine)
        top.setLevel(before)
