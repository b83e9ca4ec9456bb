"""Communicators of our own have the time-out of the group that they are made of."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from helpers.ranks import run_ranks
from soonest.runtime import comm
from soonest.runtime.comm import groups


def time_outs() -> list[float]:
    """Of a private group, of one more over it, and of those inside of hosts and across."""
    private = groups.private_group(None, 17.0)
    found = groups.ranks_of(private, f"host {dist.get_rank() // 2}")
    inner: list[Any] = [found.second, found.control, found.inside, found.across]
    return [groups.timeout_of(group) for group in (private, *inner, groups.private_group(private))]


def test_what_is_made_of_a_group_has_its_time_out() -> None:
    assert run_ranks(time_outs, 4, collective_timeout_s=60) == [[17.0] * 6] * 4


def of_backends(*seconds: float) -> comm.Group:
    """A group whose backends, one a device, have these time-outs."""
    backends = [SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(seconds=s)))
                for s in seconds]  # fmt: skip
    made: Any = SimpleNamespace(
        _device_types=range(len(backends)), _get_backend=lambda device: backends[device]
    )
    return made


def test_the_shortest_time_out_of_several_backends_counts() -> None:
    assert groups.timeout_of(of_backends(30.0, 10.0, 20.0)) == 10.0


def test_a_time_out_that_is_asked_for_counts() -> None:
    assert groups.timeout_for(of_backends(30.0), 5.0) == timedelta(seconds=5)
    assert groups.timeout_for(of_backends(30.0), None) == timedelta(seconds=30)
