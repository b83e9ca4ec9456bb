"""Communicators of our own, and which ranks share a host."""

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
"""By group, a part of the key-value store that is new, where one was given."""


def ranks_of(group: Group, host: str | None = None, *, native: bool = False) -> Ranks:
    """Finds out which ranks share a host; a collective call.

    Args:
        group: all ranks.
        host: a name for this rank's host; by default machine and network namespace.
        native: as in ``Ranks``: for devices, whose ops never overlap, so that one communicator is
            enough.
    """
    hosts = comm.gather_objects(group, host or host_name())
    rank, params = group.rank(), dist.get_process_group_ranks(group)
    second, control = (group, None) if native else (again(group), again(group))
    by_host = [[r for r, other in enumerate(hosts) if other == name] for name in sorted(set(hosts))]
    sizes = {len(these) for these in by_host}
    if len(by_host) == 1 or len(sizes) > 1 or 1 in sizes:
        return Ranks(group, second, native=native, control=control)
    places = [list(place) for place in zip(*by_host, strict=True)]
    mine = [next(these for these in groups if rank in these) for groups in (by_host, places)]
    inside, across = (_subgroup(group, [params[r] for r in these]) for these in mine)
    return Ranks(group, second, inside, across, native, control)


def host_name() -> str:
    """Names this machine; containers and emulated hosts on it are machines of their own."""
    try:
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def again(group: Group) -> Group:
    """One more communicator over the ranks of a group; a collective call."""
    return _subgroup(group, dist.get_process_group_ranks(group))


def store_of(group: Group) -> dist.distributed_c10d.Store:
    """Where in the key-value store the ranks of a group keep what concerns it."""
    return _stores.get(group) or dist.distributed_c10d._get_default_store()


def has_own_store(group: Group) -> bool:
    """Whether no ranks but these have ever written to ``store_of``."""
    return group in _stores


def _subgroup(group: Group, params: list[int]) -> Group:
    timeout = datetime.timedelta(seconds=timeout_of(group))
    store = _stores.get(group)
    with _by_these_alone(group), _keys_in(store):
        made = dist.new_group(
            params,
            timeout=timeout,
            backend=dist.get_backend(group),
            pg_options=_options(group, timeout),
            use_local_synchronization=True,
            group_desc="soonest",
        )
    return _kept(made, store)


@contextmanager
def _by_these_alone(callers: Group) -> Iterator[None]:
    """What is made inside needs no rank but the callers.

    If the default group is bound to a device, torch splits all others off that one, and so waits
    for all of its ranks. These connect by themselves then, when they first combine something.
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
    """Ranks that make a group inside find each other in this store; in the default one if None.

    torch names keys alike in all processes that a launcher starts one after the other, and the
    store may outlive them. Whoever comes first would then find addresses of processes that are no
    more, and try to connect to these.
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
    """On devices, what is sent goes ahead of what is computed: others wait for it."""
    if "nccl" not in dist.get_backend_config(parent):
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options


def private_group(
    parent: Group | None, timeout_s: float | None, store: dist.distributed_c10d.Store | None = None
) -> Group:
    """A communicator of our own over the ranks of ``parent``, so that no other traffic mixes in.

    Args:
        parent: None stands for the default group.
        timeout_s: of every collective; None keeps the parent's.
        store: in which the ranks find each other; if None, where those of the parent did.
    """
    parent = parent if parent is not None else dist.group.WORLD
    assert parent is not None
    timeout = timeout_for(parent, timeout_s)
    store = store if store is not None else _stores.get(parent)
    with _by_these_alone(parent), _keys_in(store):
        group = dist.new_group(
            dist.get_process_group_ranks(parent),
            timeout=timeout,
            backend=dist.get_backend(parent),
            pg_options=_options(parent, timeout),
            use_local_synchronization=parent is not dist.group.WORLD,
            group_desc="soonest",
        )
    return _kept(group, store)


def _kept(made: object, store: dist.distributed_c10d.Store | None) -> Group:
    """A group that was just made, with the store in which its ranks have found each other."""
    assert isinstance(made, Group)
    if store is not None:
        _stores[made] = store
    return made


def timeout_for(parent: Group, timeout_s: float | None) -> datetime.timedelta:
    """That of collectives in a communicator made of ``parent``; None stands for the parent's."""
    return datetime.timedelta(seconds=timeout_of(parent) if timeout_s is None else timeout_s)


def timeout_of(group: Group) -> float:
    """Seconds after which the group's collectives give up."""
    backends = [group._get_backend(device) for device in group._device_types]
    options = [getattr(backend, "options", None) for backend in backends]
    found = [timeout for one in options if (timeout := getattr(one, "_timeout", None))]
    return min(found, default=dist.default_pg_timeout).total_seconds()


def failure_of(group: Group, device: torch.device) -> Callable[[], str | None]:
    """What to ask whether the backend knows that something has failed; in words."""
    backend: Any = group._get_backend(device)

    def failure() -> str | None:
        error = backend.get_error().name
        return None if error == "SUCCESS" else f"the backend says {error}"

    try:
        failure()
    except (AttributeError, RuntimeError):  # some do not say
        return lambda: None
    return failure
