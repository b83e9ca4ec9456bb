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
"""The ends of a process's connections: ports by address of an interface."""


class Connection(NamedTuple):
    """One of this process's own.

    Args:
        descriptor: of its socket.
        inode: by which one sees that it is still that socket.
        rank: who is at the other end.
    """

    descriptor: int
    inode: int
    rank: int


_ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)\]:(\d+)")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_STANDS, _LISTENS = 1, 10
"""States of a connection, as Linux numbers them."""


class _Socket(NamedTuple):
    """One of this process's own: address and port of both ends, if it has them, and its state."""

    descriptor: int
    inode: int
    here: tuple[str, int]
    there: tuple[str, int] | None
    state: int


def ends() -> Ends:
    """Those of this process; none where the system does not tell."""
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
    """Connections of this process to others on other hosts.

    Args:
        known: ends of all that there are.
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
        ends: of all processes; those to this one itself are never asked for.

    Attributes:
        ends: the same.
    """

    def __init__(self, ends: Sequence[Ends] = ()) -> None:
        self.ends = ends
        # By several, for one breaks also where a process gives up what that one is for.
        self._reached = {who for who, count in enumerate(_standing(ends)) if count > 1}

    def ended(self, who: Sequence[int]) -> list[int]:
        """Those of some processes that are no more: no connection to them stands.

        However a process ends, its system closes all of them at once.
        """
        reached = [one for one in who if one in self._reached]
        known = [self.ends[one] for one in reached]
        standing = _standing(known, anew=True) if reached else []
        return [one for one, count in zip(reached, standing, strict=True) if not count]

    def cut(self) -> None:
        """Ends all that this process has to them; a backend that waits for one gives up."""
        for one in _sockets(anew=True):
            if one.there is None:
                continue
            address, port = one.there
            if any(port in ends.get(address, ()) for ends in self.ends):
                with suppress(OSError), socket.socket(fileno=os.dup(one.descriptor)) as found:
                    found.shutdown(socket.SHUT_RDWR)

    def broken(self, error: Exception) -> int | None:
        """To whom a connection has broken; None if the error of a backend does not say so."""
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
    """How many connections stand from this process to each of some."""
    there = [one.there for one in _sockets(anew=anew) if one.there is not None]
    return [sum(port in ends.get(address, ()) for address, port in there) for ends in known]


def _swapped(port: int) -> int:
    """As gloo prints it: the other way round."""
    return struct.unpack("<H", struct.pack(">H", port & 0xFFFF))[0]


_seen: dict[tuple[int, int], _Socket | None] = {}
"""By descriptor and inode, what was found there: there may be thousands, which hardly change."""


def _sockets(*, anew: bool = False) -> list[_Socket]:
    """All of them.

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
    """As backends write it."""
    there = ip_address(address.partition("%")[0])
    return str(getattr(there, "ipv4_mapped", None) or there)
