"""Rates of methods, by numbers that are worked out by hand."""

from __future__ import annotations

import pytest

from soonest.bench.methods import Costs, kept


def costs(hosts: int) -> Costs:
    times = {"allreduce": (0.02,), "gather": (0.01,), "shard": (0.001,)}
    return Costs(hosts, 1e8, {1 << 20: times}, {1 << 20: 0.1}, 1.0)


@pytest.mark.parametrize(("hosts", "share"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_what_each_link_carries_in_an_all_reduce(hosts: int, share: float):
    """A link carries 2 (n - 1) / n times the tensor."""
    assert costs(hosts).busbw(1000, 0.5) == pytest.approx(share * 2000)


def test_the_cheapest_that_leaves_no_parts_is_chosen():
    (choice,) = costs(4).chosen()
    assert (choice.method, choice.over_allreduce) == ("gather", 2.0)


def test_what_is_far_too_dear_is_measured_no_further():
    methods, cost_s = ("allreduce", "gather", "split"), {"allreduce": 9.0, "gather": 1, "split": 5}
    assert kept(methods, 1 << 10, cost_s) == list(methods)
    assert kept(methods, 1 << 20, cost_s) == ["allreduce", "gather"]
