"""Communicators of our own, and which ranks share a host.

A user's collectives must not come between the plan's ops, on any rank, in any order, and a
communicator matches what ranks send by the order in which they send it. So soonest never uses a
group of the user's, and has one for each kind of traffic whose order against the others may differ
between ranks.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from soonest.runtime import comm
from soonest.runtime.comm import Group, Ranks

_stores: WeakKeyDictionary[Group, dist.distributed_c10d.Store] = WeakKeyDictionary()
"""By group, the part of the key-value store that only its ranks use, where one was given."""


def ranks_of(group: Group, host: str | None = None, *, native: bool = False) -> Ranks:
    """Finds out which ranks share a host, and connects them; a collective call.

    Args:
        group: all ranks.
        host: a name for this rank's host; by default machine and network namespace.
        native: as in ``Ranks``: for devices, whose ops never overlap, so that one communicator is
            enough. Two of NCCL's in flight could deadlock.
    """
    hosts = comm.gather_objects(group, host or host_name())
    rank, members = group.rank(), dist.get_process_group_ranks(group)
    second, control = (group, None) if native else (private_group(group), private_group(group))
    by_host = [[r for r, other in enumerate(hosts) if other == name] for name in sorted(set(hosts))]
    sizes = {len(these) for these in by_host}
    if len(by_host) == 1 or len(sizes) > 1 or 1 in sizes:
        return Ranks(group, second, native=native, control=control)
    places = [list(place) for place in zip(*by_host, strict=True)]
    mine = [next(these for these in groups if rank in these) for groups in (by_host, places)]
    inside, across = (_connected(group, [members[r] for r in these]) for these in mine)
    return Ranks(group, second, inside, across, native, control)


def host_name() -> str:
    """Names this machine; containers and emulated hosts on it are machines of their own."""
    try:
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def store_of(group: Group) -> dist.distributed_c10d.Store:
    """The part of the key-value store in which the ranks of a group tell each other of it."""
    return _stores.get(group) or dist.distributed_c10d._get_default_store()


def has_own_store(group: Group) -> bool:
    """Whether no ranks but these have ever written to ``store_of``."""
    return group in _stores


@contextmanager
def _by_these_alone(callers: Group) -> Iterator[None]:
    """Lets groups that are made within this context need no rank but the callers.

    If the default group is bound to a device, torch splits all others off that one, and so waits
    for all of its ranks. These connect by themselves then, when they first send something.
    """
    default: Any = dist.group.WORLD
    bound = default.bound_device_id
    if bound is None or callers.size() == default.size():
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


@contextmanager
def _keys_in(store: dist.distributed_c10d.Store | None) -> Iterator[None]:
    """Lets ranks that make a group within this context find each other in this store.

    torch names keys alike in all processes that a launcher starts one after the other, and the
    store may outlive them. Whoever comes first would then find addresses of processes that are no
    more, and try to connect to these.

    Args:
        store: the default one if None.
    """
    places, default = dist.distributed_c10d._world.pg_map, dist.group.WORLD
    assert default is not None
    before = places[default]
    if store is not None:
        places[default] = before[0], store
    try:
        yield
    finally:
        places[default] = before


def _options(parent: Group, timeout: datetime.timedelta) -> Any:
    """Gives NCCL streams of high priority: other ranks wait for what is sent."""
    if "nccl" not in dist.get_backend_config(parent):
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options


def private_group(
    parent: Group | None,
    timeout_s: float | None = None,
    store: dist.distributed_c10d.Store | None = None,
) -> Group:
    """A communicator of our own over the ranks of ``parent``, so that no other traffic mixes in.

    A collective call. ``rendezvous.connect`` says which rank is missing if not all make it.

    Args:
        parent: None stands for the default group.
        timeout_s: of every collective; None keeps the parent's.
        store: in which the ranks find each other; if None, where those of the parent did.
    """
    parent = parent if parent is not None else dist.group.WORLD
    assert parent is not None
    return _connected(parent, dist.get_process_group_ranks(parent), timeout_s, store)


def _connected(
    parent: Group,
    members: list[int],
    timeout_s: float | None = None,
    store: dist.distributed_c10d.Store | None = None,
) -> Group:
    """As ``private_group``, over some ranks of ``parent``, given by their numbers among all."""
    timeout = timeout_for(parent, timeout_s)
    store = store if store is not None else _stores.get(parent)
    with _by_these_alone(parent), _keys_in(store):
        made = dist.new_group(
            members,
            timeout=timeout,
            backend=dist.get_backend(parent),
            pg_options=_options(parent, timeout),
            use_local_synchronization=parent is not dist.group.WORLD,
            group_desc="soonest",
        )
    assert isinstance(made, dist.ProcessGroup)
    if store is not None:
        _stores[made] = store
    return made


def timeout_for(parent: Group, timeout_s: float | None) -> datetime.timedelta:
    """The time-out of collectives in a group made of ``parent``; None stands for the parent's."""
    return datetime.timedelta(seconds=timeout_of(parent) if timeout_s is None else timeout_s)


def timeout_of(group: Group) -> float:
    """Seconds after which the group's collectives give up."""
    backends = [group._get_backend(device) for device in group._device_types]
    options = [getattr(backend, "options", None) for backend in backends]
    found = [timeout for one in options if (timeout := getattr(one, "_timeout", None))]
    return min(found, default=dist.default_pg_timeout).total_seconds()


def failure_of(group: Group, device: torch.device) -> Callable[[], str | None]:
    """Makes a function that says what the backend knows to have failed; None if nothing has."""
    backend: Any = group._get_backend(device)

    def failure() -> str | None:
        error = backend.get_error().name
        return None if error == "SUCCESS" else f"the backend says {error}"

    try:
        failure()
    except (AttributeError, RuntimeError):  # some do not say
        return lambda: None
    return failure
