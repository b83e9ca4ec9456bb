"""Finds what is not ordered on a device: a model of streams and events, on a CPU.

Operations really run at once, in the order in which the host enqueues them. Beside that, vector
clocks say which of them a device would have to run one after the other (F. Mattern, "Virtual time
and global states of distributed systems", 1989). Two that touch the same memory, one of them
writing, must be ordered. A program without such pairs gives the same results in any order that a
device may choose, so also those of this run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CELL_BYTES = 2

Clock = dict[int, int]
"""By stream, up to which of its operations something is ordered behind it."""


def _merge(into: Clock, other: Clock) -> None:
    for stream, at in other.items():
        if at > into.get(stream, 0):
            into[stream] = at


@dataclass(eq=False)
class Memory:
    """What was done to one piece of memory: per stream and cell, the last read and the last write.

    Args:
        base: address.
        cells: how many.
        made_on: the stream whose operation allocated it.
        alive: refers to what keeps it.
    """

    base: int
    cells: int
    made_on: int
    alive: StorageWeakRef
    reads: dict[int, Any] = field(default_factory=dict[int, Any])
    writes: dict[int, Any] = field(default_factory=dict[int, Any])
    kept_for: set[int] = field(default_factory=set[int])

    def last(self, stream: int) -> int:
        tables = (self.reads.get(stream), self.writes.get(stream))
        return max((int(table.max()) for table in tables if table is not None), default=0)


class Detector:
    """The clocks of all streams, and what they have done to memory.

    Args:
        private: streams of which the user of an allocator knows nothing: memory that they use must
            be protected from being used again. Others are the user's own affair.

    Attributes:
        races: what was found, in words.
        host_waits: operations that let the host wait for the device, in order.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.host_waits: list[str] = []
        self.names: list[str] = []
        self.private: set[int] = set()
        self._clocks: list[Clock] = []
        self._host: Clock = {}
        self._bases: list[int] = []
        self._memories: list[Memory] = []
        self._at_risk: list[Memory] = []
        self._did: dict[tuple[int, int], str] = {}

    # Streams and events

    def new_stream(self, name: str, *, private: bool = False) -> int:
        self.names.append(name)
        self._clocks.append({})
        stream = len(self._clocks) - 1
        if private:
            self.private.add(stream)
        return stream

    def record(self, stream: int) -> Clock:
        return dict(self._clocks[stream])

    def wait(self, stream: int, clock: Clock) -> None:
        _merge(self._clocks[stream], clock)

    def host_learns(self, clock: Clock) -> None:
        """The host has seen that all this has happened: whatever it enqueues now comes after."""
        _merge(self._host, clock)

    # Operations

    def run(
        self, stream: int, what: str, reads: Iterable[Tensor] = (), writes: Iterable[Tensor] = ()
    ) -> None:
        """An operation is enqueued."""
        self._bury()
        clock = self._clocks[stream]
        _merge(clock, self._host)
        clock[stream] = at = clock.get(stream, 0) + 1
        self._did[stream, at] = what
        written = [self._place(t, stream) for t in writes if t.numel()]
        read = [self._place(t, stream) for t in reads if t.numel()]
        for memory, cells in read:
            self._compare(memory, cells, stream, memory.writes, what)
        for memory, cells in written:
            self._compare(memory, cells, stream, memory.writes, what)
            self._compare(memory, cells, stream, memory.reads, what)
        for places, kind in ((read, "reads"), (written, "writes")):
            for memory, cells in places:
                at_risk = stream != memory.made_on and {stream, memory.made_on} & self.private
                if at_risk and memory not in self._at_risk:
                    self._at_risk.append(memory)
                tables = getattr(memory, kind)
                if stream not in tables:
                    tables[stream] = np.zeros(memory.cells, np.int64)
                tables[stream][cells] = at

    def _compare(
        self, memory: Memory, cells: slice, stream: int, tables: dict[int, Any], what: str
    ) -> None:
        known = self._clocks[stream]
        for other, table in tables.items():
            latest = int(table[cells].max())
            if other != stream and latest > known.get(other, 0):
                before = self._did[other, latest]
                self.races.append(
                    f"{what} on {self.names[stream]} is not ordered behind "
                    f"{before} on {self.names[other]}"
                )

    def made(self, tensor: Tensor, stream: int) -> None:
        """A tensor was allocated."""
        self._place(tensor, stream)

    def is_known(self, tensor: Tensor) -> bool:
        return self._find(tensor.data_ptr()) is not None

    def keep(self, tensor: Tensor, stream: int) -> None:
        """What ``record_stream`` does."""
        memory, _ = self._place(tensor, stream)
        memory.kept_for.add(stream)

    def _place(self, tensor: Tensor, stream: int) -> tuple[Memory, slice]:
        memory = self._find(tensor.data_ptr())
        if memory is None:
            storage = tensor.untyped_storage()
            memory = Memory(
                storage.data_ptr(),
                -(-storage.nbytes() // _CELL_BYTES),
                stream,
                StorageWeakRef(storage),
            )
            index = bisect_right(self._bases, memory.base)
            self._bases.insert(index, memory.base)
            self._memories.insert(index, memory)
        start = (tensor.data_ptr() - memory.base) // _CELL_BYTES
        spans = (
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        extent = (sum(spans) + 1) * tensor.element_size()
        stop = (tensor.data_ptr() - memory.base + extent - 1) // _CELL_BYTES + 1
        return memory, slice(start, stop)

    def _find(self, address: int) -> Memory | None:
        while (index := bisect_right(self._bases, address) - 1) >= 0:
            memory = self._memories[index]
            if not memory.alive.expired():
                inside = address < memory.base + memory.cells * _CELL_BYTES
                return memory if inside else None
            del self._memories[index], self._bases[index]
            self._bury()
        return None

    def _bury(self) -> None:
        """Looks for memory that was freed: an allocator gives it to the stream that made it."""
        for memory in [m for m in self._at_risk if m.alive.expired()]:
            self._at_risk.remove(memory)
            known = self._clocks[memory.made_on]
            for stream in {*memory.reads, *memory.writes} - {memory.made_on, *memory.kept_for}:
                safe = max(known.get(stream, 0), self._host.get(stream, 0))
                if (last := memory.last(stream)) > safe:
                    self.races.append(
                        f"memory of {self.names[memory.made_on]} is freed, which "
                        f"{self._did[stream, last]} on {self.names[stream]} still uses"
                    )


_number = count()


@dataclass(frozen=True, eq=False)
class FakeEvent:
    """A point in a stream that the device reaches late: the host sees it after asking often."""

    streams: FakeStreams
    clock: Clock
    number: int = field(default_factory=lambda: next(_number))

    def query(self) -> bool:
        return self.streams.has_happened(self)


class FakeStreams:
    """Streams as ``DeviceStreams`` has them, of a device that is modelled.

    Args:
        patience: how often the host has to ask until something has happened.
        without: numbers of waits, and of tensors to keep, that are left out.

    Attributes:
        waits, keeps: how many there were.
        failed: what ``Event.query`` raises, if something is to have failed.
    """

    def __init__(self, *, patience: int = 3, without: Iterable[int] = ()) -> None:
        self.detector = Detector()
        self.main = self.detector.new_stream("main")
        self._stack = [self.main]
        self._patience = patience
        self._asked: dict[int, int] = {}
        self._without = set(without)
        self.waits = 0
        self.in_graph = False
        self.failed: Exception | None = None

    def has_happened(self, event: FakeEvent) -> bool:
        if self.failed is not None:
            raise self.failed
        self._asked[event.number] = asked = self._asked.get(event.number, 0) + 1
        if asked <= self._patience:
            return False
        self.detector.host_learns(event.clock)
        return True

    def stream(self, name: str) -> int:
        """One of the user's own."""
        return self.detector.new_stream(name)

    def make(self) -> int:
        return self.detector.new_stream(f"lane {len(self.detector.names)}", private=True)

    def current(self) -> int:
        return self._stack[-1]

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        self._stack.append(stream)
        try:
            yield
        finally:
            self._stack.pop()

    def switch(self, stream: int) -> None:
        """What is on ``stream`` from now on, without end."""
        self._stack[-1] = stream

    def record(self, stream: Any, *, timed: bool = False) -> FakeEvent:
        return FakeEvent(self, self.detector.record(stream))

    def wait(self, stream: Any, event: Any) -> None:
        self.waits += 1
        if self.waits - 1 not in self._without:
            self.detector.wait(stream, event.clock)

    def follow(self, stream: int, other: int) -> None:
        """What a user writes as ``stream.wait_stream(other)``; never left out."""
        self.detector.wait(stream, self.detector.record(other))

    def seconds(self, first: Any, last: Any) -> float:
        return (last.number - first.number) * 1e-6

    def keep(self, tensor: Tensor, stream: Any) -> None:
        if self.detector.is_known(tensor):
            self.detector.keep(tensor, stream)

    def capturing(self) -> bool:
        return self.in_graph


_NO_ACCESS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")
_HOST_WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


class Watch(TorchDispatchMode):
    """Within this context, the detector sees what torch's operations do to memory.

    Numbers that no operation has made of a device's tensors, as the counts of steps that optimizers
    keep, are the host's.
    """

    def __init__(self, streams: FakeStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        detector, stream = self._streams.detector, self._streams.current()
        name = func._schema.name.removeprefix("aten::")
        reads, writes = _accesses(func._schema, args, kwargs)
        known = {id(t): detector.is_known(t) for t in (*reads, *writes)}
        result = func(*args, **kwargs)
        views = [r.alias_info for r in func._schema.returns]
        if views and all(alias is not None and not alias.is_write for alias in views):
            return result  # a view touches no memory
        if name in _HOST_WAITS and any(known.values()):
            detector.run(stream, name, [t for t in reads if known[id(t)]])
            detector.host_learns(detector.record(stream))
            detector.host_waits.append(name)
            return result
        inside = {t.untyped_storage().data_ptr() for t in (*reads, *writes)}
        made = [
            t
            for t in tree_leaves(result)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inside
        ]
        made = [t for t in made if t.dim() or any(known.values())]
        if name in _NO_ACCESS:
            for tensor in made:
                detector.made(tensor, stream)
            return result
        # What is made of a device's tensors is the device's.
        reads = [t for t in reads if known[id(t)] or t.dim()]
        writes = [t for t in writes if any(known.values()) or t.dim()]
        if reads or writes or made:
            detector.run(stream, name, reads, [*writes, *made])
        return result


def _accesses(schema: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, and those that it writes to."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for index, argument in enumerate(schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        (writes if changed else reads).extend(tensors)
    return reads, writes


def watched(streams: FakeStreams, *tensors: Tensor) -> Watch:
    """A context in which operations are watched, also on these tensors, which exist already."""
    for tensor in tensors:
        streams.detector.run(streams.main, "the start", writes=[tensor])
    return Watch(streams)


def no_watch() -> Any:
    """Within this context, operations are not watched."""
    return torch.utils._python_dispatch._disable_current_modes()
