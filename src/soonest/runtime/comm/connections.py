"""Which process is at the other end of a connection.

Backends name addresses where a connection breaks. So ranks tell each other at which addresses they
are, and then know whose it was, also when nobody is left to be asked.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from ipaddress import ip_address
from typing import Any, NamedTuple

Ends = Mapping[str, Collection[int]]
"""This end of each of a process's connections: ports by address of an interface."""


class Connection(NamedTuple):
    """A connection from this process to another rank.

    Args:
        descriptor: of its socket.
        inode: of the socket; another one shows that the descriptor is used for something else.
        rank: who is at the other end.
    """

    descriptor: int
    inode: int
    rank: int


_ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)\]:(\d+)")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_STANDS, _LISTENS = 1, 10
"""TCP_ESTABLISHED and TCP_LISTEN, as Linux numbers the states of a connection."""


class _Socket(NamedTuple):
    """A TCP socket of this process: address and port of both ends, and the state."""

    descriptor: int
    inode: int
    here: tuple[str, int]
    there: tuple[str, int] | None
    state: int


def ends() -> Ends:
    """The ends of this process's connections; none where the system does not tell."""
    found: dict[str, set[int]] = {}
    for address, port in (one.here for one in _sockets()):
        found.setdefault(address, set()).add(port)
    return found


def listens_on(port: int) -> bool:
    """Whether this process is who answers at a port of this machine."""
    return any(one.state == _LISTENS and one.here[1] == port for one in _sockets())


def hosts(store: Any) -> bool:
    """Whether a key-value store is in this process."""
    while not hasattr(store, "port") and hasattr(store, "underlying_store"):
        store = store.underlying_store
    port = getattr(store, "port", None)
    return port is not None and _listens(os.getpid(), port)


@cache
def _listens(process: int, port: int) -> bool:
    """Looked up once: a store stays where it is, and there may be many connections."""
    return listens_on(port)


def leading_to(known: Sequence[Ends]) -> Iterator[Connection]:
    """Iterates over the connections of this process to ranks on other hosts.

    Args:
        known: the ends of all ranks' connections, by rank.
    """
    for one in _sockets():
        if one.there is None or not _has_link(one.here[0], one.there[0]):
            continue
        address, port = one.there
        who = [rank for rank, ends in enumerate(known) if port in ends.get(address, ())]
        if len(who) == 1:
            yield Connection(one.descriptor, one.inode, who[0])


def _has_link(here: str, far: str) -> bool:
    """Whether a connection between these addresses leaves this host."""
    return far != here and not ip_address(far).is_loopback


class Known:
    """The connections from this process to others, as they were when all was well.

    Args:
        ends: of all processes, by rank; those of this one are never asked for.

    Attributes:
        ends: the same.
    """

    def __init__(self, ends: Sequence[Ends] = ()) -> None:
        self.ends = ends
        # By several, for one breaks also where a process gives up what that one is for.
        self._reached = {who for who, count in enumerate(_standing(ends)) if count > 1}

    def __repr__(self) -> str:
        return f"Known(connections of {len(self.ends)} ranks)"

    def ended(self, who: Sequence[int]) -> list[int]:
        """Which of some processes have ended: no connection to them stands.

        However a process ends, its system closes all of them at once.
        """
        reached = [one for one in who if one in self._reached]
        known = [self.ends[one] for one in reached]
        standing = _standing(known, anew=True) if reached else []
        return [one for one, count in zip(reached, standing, strict=True) if not count]

    def cut(self) -> None:
        """Shuts down all connections to them; a backend that waits for one gives up."""
        for one in _sockets(anew=True):
            if one.there is None:
                continue
            address, port = one.there
            if any(port in ends.get(address, ()) for ends in self.ends):
                with suppress(OSError), socket.socket(fileno=os.dup(one.descriptor)) as found:
                    found.shutdown(socket.SHUT_RDWR)

    def broken(self, error: Exception) -> int | None:
        """The rank to which a connection has broken; None if a backend's error does not say so."""
        text = str(error)
        if "imed out" in text:  # who did not answer may just wait for another
            return None
        found: set[int] = set()
        for address, port in _ADDRESS.findall(text):
            for either in (int(port), _swapped(int(port))):
                theirs = enumerate(self.ends)
                found |= {who for who, ends in theirs if either in ends.get(address, ())}
        return found.pop() if len(found) == 1 else None


def _standing(known: Sequence[Ends], *, anew: bool = False) -> list[int]:
    """Counts the connections that stand from this process to each of some others."""
    there = [one.there for one in _sockets(anew=anew) if one.there is not None]
    return [sum(port in ends.get(address, ()) for address, port in there) for ends in known]


def _swapped(port: int) -> int:
    """A port with its bytes swapped, as gloo prints it."""
    return struct.unpack("<H", struct.pack(">H", port & 0xFFFF))[0]


_seen: dict[tuple[int, int], _Socket | None] = {}
"""The sockets seen last, by descriptor and inode: there may be thousands, which hardly change."""


def _sockets(*, anew: bool = False) -> list[_Socket]:
    """All TCP sockets of this process.

    Args:
        anew: look at each again, as connections may have ended since.
    """
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return []
    before = {} if anew else dict(_seen)
    now: dict[tuple[int, int], _Socket | None] = {}
    for file in map(int, names):
        try:
            status = os.fstat(file)
            if not stat.S_ISSOCK(status.st_mode):
                continue
            key = file, status.st_ino
            now[key] = before[key] if key in before else _look_at(*key)
        except OSError:  # closed meanwhile
            continue
    lasting = (_STANDS, _LISTENS)
    _seen.clear()
    _seen.update({k: one for k, one in now.items() if one is None or one.state in lasting})
    return [one for one in now.values() if one is not None]


def _look_at(file: int, inode: int) -> _Socket | None:
    """The TCP socket behind a descriptor; None if it is of another kind."""
    blocking = os.get_blocking(file)
    with socket.socket(fileno=os.dup(file)) as one:
        if socket.getdefaulttimeout() is not None:  # then Python has made it ask for that
            os.set_blocking(file, blocking)
        if one.type != socket.SOCK_STREAM or one.family not in _FAMILIES:
            return None
        state = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        there = _end(one.getpeername()) if state == _STANDS else None
        return _Socket(file, inode, _end(one.getsockname()), there, state)


def _end(name: tuple[Any, ...]) -> tuple[str, int]:
    return _readable(name[0]), name[1]


def _readable(address: str) -> str:
    """An address as backends write it."""
    there = ip_address(address.partition("%")[0])
    return str(getattr(there, "ipv4_mapped", None) or there)
