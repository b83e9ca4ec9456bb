"""Which process is at the other end of a connection.

Backends name addresses where a connection breaks. So ranks tell each other at which addresses they
are, and then know whose it was, also when nobody is left to be asked.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

Ends = Mapping[str, Collection[int]]
"""The ends of a process's connections: ports by address of an interface."""

_ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)\]:(\d+)")
_LISTENS = "0A"


def ends() -> Ends:
    """Those of this process; none where the system does not tell."""
    found: dict[str, set[int]] = {}
    for address, port, _ in _sockets():
        found.setdefault(address, set()).add(port)
    return found


def listens_on(port: int) -> bool:
    """Whether this process is who answers at a port of this machine."""
    return any(state == _LISTENS and other == port for _, other, state in _sockets())


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


def _sockets() -> Iterator[tuple[str, int, str]]:
    """Address, port and state of this process's own ends."""
    mine = set(_inodes())
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/self/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[9] in mine:
                address, port = fields[1].split(":")
                yield _readable(address), int(port, 16), fields[3]


def _inodes() -> Iterator[str]:
    folder = "/proc/self/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            yield target.removeprefix("socket:[").removesuffix("]")


def _readable(address: str) -> str:
    """As users write it; the system gives words of four bytes in its own order."""
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    there = ip_address(b"".join(struct.pack("=I", word) for word in words))
    plain = getattr(there, "ipv4_mapped", None) or there
    return str(plain)
