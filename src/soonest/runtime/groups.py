"""Communicators of our own, and which ranks share a host."""

from __future__ import annotations

import datetime
import os
import socket

import torch
import torch.distributed as dist

from soonest.runtime import collectives
from soonest.runtime.collectives import Group, Ranks


def ranks_of(group: Group, host: str | None = None) -> Ranks:
    """Finds out which ranks share a host; a collective call.

    Args:
        group: all ranks.
        host: a name for this rank's host; by default machine and network namespace.
    """
    hosts = collectives.gather_objects(group, host or host_name())
    rank, members = group.rank(), dist.get_process_group_ranks(group)
    second = again(group)
    by_host = [[r for r, other in enumerate(hosts) if other == name] for name in sorted(set(hosts))]
    sizes = {len(these) for these in by_host}
    if len(by_host) == 1 or len(sizes) > 1 or 1 in sizes:
        return Ranks(group, second)
    places = [list(place) for place in zip(*by_host, strict=True)]
    mine = [next(these for these in groups if rank in these) for groups in (by_host, places)]
    inside, across = (_subgroup(group, [members[r] for r in these]) for these in mine)
    return Ranks(group, second, inside, across)


def host_name() -> str:
    """Names this machine; containers and emulated hosts on it are machines of their own."""
    try:
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def again(group: Group) -> Group:
    """One more communicator over the ranks of a group; a collective call."""
    return _subgroup(group, dist.get_process_group_ranks(group))


def _subgroup(group: Group, members: list[int]) -> Group:
    made = dist.new_group(
        members,
        timeout=datetime.timedelta(seconds=timeout_of(group)),
        backend=dist.get_backend(group),
        use_local_synchronization=True,
        group_desc="soonest",
    )
    assert isinstance(made, Group)
    return made


def private_group(parent: Group | None, timeout_s: float | None) -> Group:
    """A communicator of our own over the ranks of ``parent``, so that no other traffic mixes in.

    Args:
        parent: None stands for the default group.
        timeout_s: of every collective; None keeps torch's default.
    """
    parent = parent if parent is not None else dist.group.WORLD
    timeout = None if timeout_s is None else datetime.timedelta(seconds=timeout_s)
    group = dist.new_group(
        dist.get_process_group_ranks(parent),
        timeout=timeout,
        backend=dist.get_backend(parent),
        use_local_synchronization=parent is not dist.group.WORLD,
        group_desc="soonest",
    )
    assert isinstance(group, Group)
    return group


def timeout_of(group: Group) -> float:
    """Seconds after which the group's collectives give up."""
    backend = group._get_backend(torch.device("cpu"))
    options = getattr(backend, "options", None)
    timeout = getattr(options, "_timeout", None) or dist.default_pg_timeout
    return timeout.total_seconds()
