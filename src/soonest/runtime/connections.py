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
from ipaddress import ip_address
from typing import NamedTuple

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


def ends() -> Ends:
    """Those of this process; none where the system does not tell."""
    found: dict[str, set[int]] = {}
    for address, port, _ in _sockets():
        found.setdefault(address, set()).add(port)
    return found


def listens_on(port: int) -> bool:
    """Whether this process is who answers at a port of this machine."""
    return any(listens and other == port for _, other, listens in _sockets())


def leading_to(known: Sequence[Ends]) -> Iterator[Connection]:
    """Connections of this process to others on other hosts.

    Args:
        known: ends of all that there are.
    """
    for file, one in _open():
        try:
            (here, _), (far, port) = one.getsockname()[:2], one.getpeername()[:2]
        except OSError:  # it listens, or is closed
            continue
        here, far = _readable(here), _readable(far)
        who = [rank for rank, ends in enumerate(known) if port in ends.get(far, ())]
        if len(who) == 1 and _has_link(here, far):
            yield Connection(file, os.fstat(one.fileno()).st_ino, who[0])


def _has_link(here: str, far: str) -> bool:
    """Whether a connection between these addresses leaves this host."""
    return far != here and not ip_address(far).is_loopback


def other_end(error: Exception, known: Sequence[Ends]) -> int | None:
    """Whose connection an error says to have broken; None if it does not say so.

    Args:
        error: of a backend.
        known: ends of all that there are.
    """
    text = str(error)
    if "imed out" in text:  # who did not answer may just wait for another
        return None
    found: set[int] = set()
    for address, port in _ADDRESS.findall(text):
        for either in (int(port), _swapped(int(port))):
            found |= {who for who, theirs in enumerate(known) if either in theirs.get(address, ())}
    return found.pop() if len(found) == 1 else None


def _swapped(port: int) -> int:
    """As gloo prints it: the other way round."""
    return struct.unpack("<H", struct.pack(">H", port & 0xFFFF))[0]


def _sockets() -> Iterator[tuple[str, int, bool]]:
    """Address and port of this process's own ends, and whether it listens there."""
    for _, one in _open():
        try:
            address, port = one.getsockname()[:2]
            listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
        except OSError:  # closed meanwhile
            continue
        yield _readable(address), port, listens


def _open() -> Iterator[tuple[int, socket.socket]]:
    """Descriptors of this process's own, each with another for the same while one looks at it."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return
    for file in map(int, names):
        try:
            if not stat.S_ISSOCK(os.fstat(file).st_mode):
                continue
            with socket.socket(fileno=os.dup(file)) as one:
                if one.type == socket.SOCK_STREAM and one.family in _FAMILIES:
                    yield file, one
        except OSError:  # closed meanwhile
            continue


def _readable(address: str) -> str:
    """As backends write it."""
    there = ip_address(address.partition("%")[0])
    return str(getattr(there, "ipv4_mapped", None) or there)
