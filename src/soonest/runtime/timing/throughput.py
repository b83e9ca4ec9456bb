"""Measures how fast this rank's connections carry what it sends, by the system's counts for TCP."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache

from soonest.runtime.comm import connections

_LEAST_BYTES, _LEAST_US = 1 << 16, 10_000
"""The least that a connection must have carried, and for how long, to show its rate: small messages
show latency, and time is counted in ticks of 1 to 10 ms."""
_BYTES_ACKED, _TIMES = struct.Struct("=120xQ"), struct.Struct("=168xQQ")
"""Where these stand in Linux's ``struct tcp_info`` (include/uapi/linux/tcp.h, since 4.10): bytes
that have arrived; microseconds in which some were under way, and those in which the receiver took
none."""


class Throughput:
    """Watches the connections to ranks on other hosts.

    Args:
        ends: the ends of all ranks' connections, by rank.
    """

    def __init__(self, ends: Sequence[connections.Ends]) -> None:
        self._ranks = len(ends)
        self._told = ctypes.create_string_buffer(_TIMES.size)
        self._size = ctypes.c_uint()
        found = connections.leading_to(ends) if sys.platform == "linux" else ()
        self._counts = {one: counts for one in found if (counts := self._counts_of(one))}

    def bps(self) -> list[float]:
        """Bits per second, by rank, at which what was sent there since the last call went.

        It is what arrived, by the time in which anything was under way. NaN where it is not known:
        nothing much was sent, it is this host, or the system does not count.
        """
        arrived, busy_us = [0] * self._ranks, [0] * self._ranks
        for one, before in list(self._counts.items()):
            now = self._counts_of(one)
            if now is None:  # closed meanwhile
                del self._counts[one]
                continue
            self._counts[one] = now
            if now[0] - before[0] >= _LEAST_BYTES:
                arrived[one.rank] += now[0] - before[0]
                busy_us[one.rank] += now[1] - before[1]
        return [
            8e6 * size / time_us if time_us >= _LEAST_US else math.nan
            for size, time_us in zip(arrived, busy_us, strict=True)
        ]

    def _counts_of(self, one: connections.Connection) -> tuple[int, int] | None:
        """Bytes that have arrived, and microseconds in which some were under way, if known."""
        try:
            if os.fstat(one.descriptor).st_ino != one.inode:
                return None
        except OSError:
            return None
        told, size = self._told, self._size
        size.value = _TIMES.size
        failed = _getsockopt()(
            one.descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, told, ctypes.byref(size)
        )
        if failed or size.value < _TIMES.size:
            return None
        busy_us, stopped_us = _TIMES.unpack_from(told)
        return _BYTES_ACKED.unpack_from(told)[0], busy_us - stopped_us


@cache
def _getsockopt() -> Callable[..., int]:
    """The system's function: a ``socket`` of Python's would close the backend's when it goes."""
    return ctypes.PyDLL(None).getsockopt
