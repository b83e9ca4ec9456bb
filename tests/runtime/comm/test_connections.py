"""Whose connection has broken, as far as a backend's words and the system tell."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import soonest
from helpers.ranks import run_ranks
from soonest.runtime.comm import connections, signals


def test_the_ends_of_this_process_are_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            ends = connections.ends()
            assert {port, client.getsockname()[1]} <= set(ends["127.0.0.1"])
        assert connections.listens_on(port)
    assert not connections.listens_on(port)


def test_who_has_ended_is_known_once_no_connection_stands() -> None:
    """One of several may also break because a rank gives up what that one is for."""
    with ExitStack() as all_of_them:
        server = all_of_them.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = server.getsockname()
        clients = [socket.create_connection(address) for _ in range(2)]
        accepted = [server.accept()[0] for _ in clients]
        them = {"127.0.0.1": {address[1]}}
        noop = {"127.0.0.2": {address[1]}}
        known = connections.Known([them, noop])
        assert known.ended([0, 1]) == []
        accepted[0].close()
        clients[0].close()
        assert known.ended([0, 1]) == []
        accepted[1].close()  # as a system does for a process; here none reads what it is told
        assert known.ended([0, 1]) == [0]
        assert known.ended([1]) == []
        clients[1].close()


KNOWN = [{"10.0.0.1": {1000, 1001}}, {"10.0.0.2": {1000}}, {"fe80::1": {7}, "10.0.0.1": {2000}}]


@pytest.mark.parametrize(
    ("text", "who"),
    [
        ("Connection closed by peer [10.0.0.1]:1001", 0),
        ("Connection closed by peer [10.0.0.2]:1000", 1),
        ("Read error [10.0.0.1]:53255: Connection reset by peer", 2),  # 2000 the other way round
        ("writev [fe80::1]:7: Broken pipe", 2),
        ("Connection closed by peer [10.0.0.3]:1000", None),
        ("Connection closed by peer", None),
        ("[10.0.0.2]:1000: Timed out waiting 4000ms for recv operation to complete", None),
        ("[/a/b/pair.cc:537] Read error [10.0.0.2]:1000", 1),
    ],
)
def test_who_is_at_the_other_end(text: str, who: int | None) -> None:
    assert connections.Known(KNOWN).broken(RuntimeError(text)) == who


class Handler:
    def __call__(self, *_: object) -> None:
        raise RuntimeError("by an object")

    def method(self, *_: object) -> None:
        raise RuntimeError("by a method")


def function(_first: object, *_: object) -> None:
    raise RuntimeError("by a function")


@pytest.mark.parametrize("handler", [Handler(), Handler().method, function, partial(function, 1)])
def test_what_a_handler_raises_is_told_from_other_errors(handler: object) -> None:
    before = signal.signal(signal.SIGUSR1, handler)  # type: ignore[arg-type]
    try:
        with pytest.raises(RuntimeError) as raised:
            signal.raise_signal(signal.SIGUSR1)
        assert signals.is_from_handler(raised.value)
        with pytest.raises(RuntimeError) as other:
            raise RuntimeError("by the test")
        assert not signals.is_from_handler(other.value)
    finally:
        signal.signal(signal.SIGUSR1, before)


def listening() -> list[str]:
    """The addresses at which this process listens."""
    sockets = connections._sockets()
    return [one.here[0] for one in sockets if one.state == connections._LISTENS]


def trained_where_others_could_listen() -> tuple[list[str], int, set[str]]:
    """Where it listens after some training, groups of ranks, and the ends of all connections."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = soonest.prioritize(model, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    handle.flush()
    return listening(), len(dist.distributed_c10d._world.pg_map), set(connections.ends())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_nothing_listens_but_where_the_group_does() -> None:
    with socket.create_server(("127.0.0.1", 0)):
        assert "127.0.0.1" in listening()
    for addresses, groups, ends in run_ranks(trained_where_others_could_listen, 2):
        assert set(addresses) == {"127.0.0.1"}, "ranks are on loopback, and nobody else may come in"
        assert len(addresses) <= groups, "the backend listens once for each group"
        assert ends == {"127.0.0.1"}


def test_who_is_at_the_other_end_of_each_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_has_link", lambda here, far: far != here)
    with (
        socket.create_server(("127.0.0.2", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        far = server.getsockname()
        known = [{}, {far[0]: {far[1]}}, {far[0]: {far[1] - 1}}]
        (found,) = (one for one in connections.leading_to(known) if one.rank)
        assert (found.descriptor, found.rank) == (client.fileno(), 1)
        assert os.fstat(client.fileno()).st_ino == found.inode
        twice = [{far[0]: {far[1]}}] * 2
        assert not [one for one in connections.leading_to(twice) if one.descriptor == found[0]]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_connections_on_one_host_have_no_link(address: str) -> None:
    with (
        socket.create_server((address, 0)) as server,
        socket.create_connection(server.getsockname()),
    ):
        assert not list(connections.leading_to([{address: {server.getsockname()[1]}}]))
