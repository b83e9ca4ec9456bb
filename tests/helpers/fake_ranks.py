"""Ranks that are threads of one process, each with a device of its own that is modelled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from helpers.race import FakeEvent, FakeStreams, no_watch
from soonest.runtime.comm import Ranks

_PATIENCE_S = 30


class Meeting:
    """Where the ranks of a group show each other tensors.

    Args:
        ranks: how many.
        patience_s: after which those that have come give up.
    """

    def __init__(self, ranks: int, *, patience_s: float = _PATIENCE_S) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=patience_s)
        self._shown: list[Any] = [None] * ranks

    def swap(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """What every rank has shown, by rank.

        Raises:
            RuntimeError: not all have come.
        """
        try:
            self._shown[rank] = tensor.clone()
            self._barrier.wait()
            shown = list(self._shown)
            self._barrier.wait()
        except threading.BrokenBarrierError as error:
            raise RuntimeError("the connection is closed by peer") from error
        return shown

    def leave(self) -> None:
        """From now on nobody meets here."""
        self._barrier.abort()


class FakeWork:
    """As of NCCL: to wait for it is to let the current stream wait, and until then it keeps what it
    uses."""

    def __init__(self, streams: FakeStreams, event: FakeEvent, uses: Any) -> None:
        self._streams, self._event, self._uses = streams, event, uses

    def wait(self, timeout: Any = None) -> bool:
        self._streams.wait(self._streams.current(), self._event)
        self._uses = None
        return True

    def is_completed(self) -> bool:
        return True


class HostWork:
    """As of gloo: to wait for it is to wait."""

    def __init__(self, running: Future[None]) -> None:
        self._running = running

    def wait(self, timeout: timedelta | None = None) -> bool:
        try:
            self._running.result(None if timeout is None else timeout.total_seconds())
        except TimeoutError as error:
            raise RuntimeError("timed out") from error
        return True

    def is_completed(self) -> bool:
        return self._running.done()


class FakeGroup:
    """A process group: its ops run on a stream of their own if there are streams, else in a
    thread of their own.

    Args:
        meeting: of all ranks.
        rank: which one this is.
        streams: of its device.
    """

    def __init__(self, meeting: Meeting, rank: int, streams: FakeStreams | None) -> None:
        self._meeting, self._rank, self._streams = meeting, rank, streams
        if streams is not None:
            self._stream = streams.detector.new_stream("network", private=True)
        else:
            self._thread = ThreadPoolExecutor(1)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def size(self) -> int:
        return self._meeting.ranks

    def rank(self) -> int:
        return self._rank

    def _run(
        self, what: str, given: Tensor, out: Tensor, made: Callable[[list[Tensor]], Tensor]
    ) -> FakeWork | HostWork:
        def meet() -> None:
            with no_watch(), torch.no_grad():
                out.copy_(made(self._meeting.swap(self._rank, given)))

        streams = self._streams
        if streams is None:
            return HostWork(self._thread.submit(meet))
        meet()
        streams.follow(self._stream, streams.current())
        streams.detector.run(self._stream, what, [given], [out])
        return FakeWork(streams, streams.record(self._stream), (given, out))

    def allreduce(self, tensors: list[Tensor]) -> FakeWork | HostWork:
        (tensor,) = tensors
        return self._run("allreduce", tensor, tensor, lambda every: _sum(every))

    def broadcast(self, tensor: Tensor, root: int) -> FakeWork | HostWork:
        return self._run("broadcast", tensor, tensor, lambda every: every[root])

    def all_gather_single(self, out: Tensor, given: Tensor) -> FakeWork | HostWork:
        return self._run("allgather", given, out, torch.cat)

    def reduce_scatter_single(self, out: Tensor, given: Tensor, opts: Any) -> FakeWork | HostWork:
        def mine(every: list[Tensor]) -> Tensor:
            return _sum(every).view(self.size(), -1)[self._rank]

        return self._run("reduce_scatter", given, out, mine)

    def all_to_all_single(
        self, out: Tensor, given: Tensor, out_sizes: Sequence[int], sizes: Sequence[int]
    ) -> FakeWork | HostWork:
        n, rank = self.size(), self._rank

        def mine(every: list[Tensor]) -> Tensor:
            # Each rank knows only its own sizes, and all have the same parts in mind.
            table = self._meeting.swap(rank, torch.tensor(list(sizes)))
            parts: list[Tensor] = []
            for theirs, split in zip(every, table, strict=True):
                where = split.tolist() or [theirs.numel() // n] * n
                parts.append(theirs.split(where)[rank])
            return torch.cat(parts)

        return self._run("alltoall", given, out, mine)


def _sum(every: Sequence[Tensor]) -> Tensor:
    total = every[0].clone()
    for tensor in every[1:]:
        total += tensor
    return total


def ranks_for(group: FakeGroup, second: FakeGroup | None = None) -> Ranks:
    """One communicator for all, as on devices, unless there is a second one."""
    first: Any = group
    other: Any = second or group
    return Ranks(first, other, native=True)


def as_threads(function: Callable[[int], Any], ranks: int) -> list[Any]:
    """Calls a function on every rank at once, and returns what each gives, by rank."""
    with ThreadPoolExecutor(ranks) as pool:
        running = [pool.submit(function, rank) for rank in range(ranks)]
        return [one.result() for one in running]
