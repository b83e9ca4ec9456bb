"""What ranks make sure of together, on ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from helpers.fake_ranks import FakeGroup, Meeting, as_threads
from soonest.errors import PlanMismatchError
from soonest.runtime import agreement


def said(each: Callable[[Any, int], None], ranks: int = 3) -> str | None:
    """What ``each(group, rank)`` raises, which must be the same on all ranks; None if nothing."""
    meeting = Meeting(ranks)

    def run(rank: int) -> str | None:
        try:
            each(FakeGroup(meeting, rank, None), rank)
        except (PlanMismatchError, ValueError) as error:
            return str(error)
        return None

    (found,) = set(as_threads(run, ranks))
    return found


def test_who_has_what_is_told_with_the_most_frequent_in_front() -> None:
    assert agreement.by_rank(["b", "a", "a", "a"]) == "a on ranks 1, 2 and 3, b on rank 0"
    assert agreement.by_rank(["a", "b"]) == "a on rank 0, b on rank 1"


def test_another_order_in_memory_is_another_model() -> None:
    def each(group: Any, rank: int) -> None:
        model = nn.Conv2d(2, 2, 2)
        if rank == 2:
            model = model.to(memory_format=torch.channels_last)
        agreement.agree_on_model(group, model)

    told = said(each)
    assert told is not None
    assert "parameter 0 is weight (2, 2, 2, 2) torch.float32 on rank 0 and" in told
    assert "in memory by (8, 1, 4, 2) on rank 2" in told
    assert said(lambda group, rank: agreement.agree_on_model(group, nn.Linear(2, 2))) is None


def test_a_missing_parameter_is_named() -> None:
    def each(group: Any, rank: int) -> None:
        agreement.agree_on_model(group, nn.Linear(2, 2, bias=rank != 1))

    told = said(each)
    assert told is not None
    assert "parameter 1 is bias (2,) torch.float32 on rank 0 and missing on rank 1" in told


def groups_told(**by_rank: list[Any]) -> str | None:
    def each(group: Any, rank: int) -> None:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        options = {name: values[rank] for name, values in by_rank.items()}
        agreement.agree_on_groups(group, model, torch.optim.AdamW(model.parameters(), **options))

    return said(each)


def test_settings_of_all_kinds_are_compared() -> None:
    assert groups_told(lr=[0.1, 0.1, 0.1], betas=[(0.9, 0.99)] * 3) is None
    told = groups_told(lr=[0.1, 0.1, 0.2])
    assert told is not None
    assert "lr in group 0 is 0.1 on ranks 0 and 1, 0.2 on rank 2" in told
    told = groups_told(betas=[(0.9, 0.999), (0.9, 0.98), (0.9, 0.999)])
    assert told is not None
    assert "betas in group 0 is (0.9, 0.999) on ranks 0 and 2, (0.9, 0.98) on rank 1" in told
    told = groups_told(lr=[torch.tensor(0.5), torch.tensor(0.25), torch.tensor(0.5)])
    assert told is not None
    assert "lr in group 0 is 0.5 on ranks 0 and 2, 0.25 on rank 1" in told


def test_buffers_and_frozen_parameters_are_compared_but_for_those_left_alone() -> None:
    def each(group: Any, rank: int) -> None:
        model = nn.BatchNorm1d(2 + (rank == 0), affine=False)
        agreement.agree_on_the_rest(group, model)

    told = said(each)
    assert told is not None
    assert (
        "buffer 'running_mean' is (2,) torch.float32 on ranks 1 and 2, (3,) torch.float32 on rank 0"
    ) in told
    left = ("running_mean", "running_var")

    def without(group: Any, rank: int) -> None:
        agreement.agree_on_the_rest(group, nn.BatchNorm1d(2 + (rank == 0), affine=False), left)

    assert said(without) is None


def test_what_one_rank_refuses_all_refuse() -> None:
    def each(group: Any, rank: int) -> None:
        agreement.agree_on_input(group, ValueError("no such thing") if rank == 1 else None)

    meeting, found = Meeting(3), []
    for rank, text in enumerate(
        as_threads(lambda r: _raised(each, FakeGroup(meeting, r, None), r), 3)
    ):
        found.append((rank, text))
    assert found == [
        (0, "rank 1: no such thing"), (1, "no such thing"), (2, "rank 1: no such thing"),
    ]  # fmt: skip


def _raised(each: Callable[[Any, int], None], group: Any, rank: int) -> str | None:
    try:
        each(group, rank)
    except ValueError as error:
        return str(error)
    return None
