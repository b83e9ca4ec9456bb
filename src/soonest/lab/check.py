"""What the links of this machine's labs really carry: a plain transfer, measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from soonest.lab.hosts import Lab
from soonest.lab.links import PAYLOAD_SHARE

RATES_BPS = (10e6, 100e6, 1e9)
"""What is measured if nothing else is asked for."""

_TIMEOUT_S = 60.0

# Rank 1 sends as fast as it can; rank 0 says how many bits per second arrived. It leaves out the
# first moments, in which burst and queue fill.
_TRANSFER = """
import os, socket, sys, time
settling_s, measured_s = 0.5, 1.5
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "1":
    while True:
        try:
            connection = socket.create_connection(address)
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    try:
        while True:
            connection.sendall(bytes(1 << 18))
    except OSError:
        sys.exit()
connection = socket.create_server(address).accept()[0]
buffer = bytearray(1 << 20)
connection.recv_into(buffer)
until_s = time.perf_counter() + settling_s
while time.perf_counter() < until_s:
    connection.recv_into(buffer)
received, began_s = 0, time.perf_counter()
while (now_s := time.perf_counter()) < began_s + measured_s:
    received += connection.recv_into(buffer)
print(8 * received / (now_s - began_s))
"""


@dataclass(frozen=True)
class Carried:
    """What one link carried.

    Args:
        asked_bps: its rate, headers included.
        payload_bps: the payload that arrived, without headers.
    """

    asked_bps: float
    payload_bps: float

    @property
    def share(self) -> float:
        """Payload by rate; ``PAYLOAD_SHARE`` is what headers leave of it."""
        return self.payload_bps / self.asked_bps

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "expected_share": PAYLOAD_SHARE}


def check_links(
    rates_bps: Sequence[float], on_rate: Callable[[float], None] = lambda _: None
) -> list[Carried]:
    """Measures what links carry, on a lab of two hosts.

    Args:
        rates_bps: of the links, one after another.
        on_rate: gets each rate before it is measured.

    Returns:
        What each carried, in the same order.

    Raises:
        ValueError: no link can have such a rate.
        RuntimeError: the lab cannot run here, or the transfer failed.
    """
    found: list[Carried] = []
    for rate_bps in rates_bps:
        on_rate(rate_bps)
        lines: list[str] = []
        with Lab(hosts=2, link_bps=rate_bps) as lab:
            code = lab.run(
                [sys.executable, "-I", "-S", "-c", _TRANSFER],
                on_line=lambda _, line, lines=lines: lines.append(line),
                timeout_s=_TIMEOUT_S,
            )
        if code:
            raise RuntimeError(f"the transfer failed, it says: {' '.join(lines)}")
        found.append(Carried(rate_bps, float(lines[-1])))
    return found
