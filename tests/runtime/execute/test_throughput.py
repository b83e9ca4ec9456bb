"""What the system says of how fast a connection carries something."""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time

import pytest

from soonest.runtime.comm import connections
from soonest.runtime.timing.throughput import Throughput

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts this way")

CHUNK = 1 << 20


@pytest.fixture(autouse=True)
def links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another address of this host stands for another host."""
    monkeypatch.setattr(connections, "_has_link", lambda here, far: far != here)


def reads(connection: socket.socket, pause_s: float) -> None:
    while connection.recv(CHUNK):
        time.sleep(pause_s)


def test_rates_are_those_of_the_connection_while_anything_is_under_way() -> None:
    with (
        socket.create_server(("127.0.0.2", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        far = server.getsockname()
        accepted, _ = server.accept()
        watch = Throughput([{}, {far[0]: {far[1]}}])
        assert all(math.isnan(bps) for bps in watch.bps()), "nothing was sent"
        reading = threading.Thread(target=reads, args=(accepted, 0.0))
        reading.start()
        began_s, sent = time.perf_counter(), 0
        while time.perf_counter() < began_s + 0.5:
            client.sendall(bytes(CHUNK))
            sent += CHUNK
        took_s = time.perf_counter() - began_s
        mine, bps = watch.bps()
        assert math.isnan(mine)
        # It is not under way in all of that time.
        assert bps > 0.5 * 8 * sent / took_s
        time.sleep(0.2)
        assert all(math.isnan(bps) for bps in watch.bps()), "nothing was sent since"
        client.shutdown(socket.SHUT_WR)
        reading.join()
        accepted.close()


def test_a_descriptor_that_is_another_file_by_now_is_left_alone() -> None:
    with socket.create_server(("127.0.0.2", 0)) as server:
        far = server.getsockname()
        client = socket.create_connection(far)
        watch = Throughput([{}, {far[0]: {far[1]}}])
        number = client.fileno()
        client.close()
        other = os.open(os.devnull, os.O_WRONLY)
        if other != number:
            os.dup2(other, number)
            os.close(other)
        assert all(math.isnan(bps) for bps in watch.bps())
        os.write(number, b"still open")
        os.close(number)
