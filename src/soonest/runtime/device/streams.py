"""The operations on a device's streams that a lane needs."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

Stream = Hashable
"""A queue of a device: what is enqueued runs in order, and in parallel with other queues."""


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the device has got there.

        Raises:
            RuntimeError: something that the device was asked to do has failed.
        """
        ...


class Streams(Protocol):
    """The streams of one device; only ``seconds`` lets the host wait."""

    def make(self) -> Stream:
        """Makes a stream of high priority."""
        ...

    def current(self) -> Stream:
        """The stream on which this thread's operations run now."""
        ...

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """Lets this thread's operations run on a stream within this context."""
        ...

    def record(self, stream: Stream, *, timed: bool = False) -> Event:
        """Records the point that a stream has been filled up to.

        Args:
            stream: which one.
            timed: ``seconds`` is to be asked of it.
        """
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """Lets what is enqueued on a stream from now on run after that point."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """How long the device took from one timed point to another; waits for both."""
        ...

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        """Keeps a tensor's memory from reuse until the stream has done all that it has now."""
        ...

    def capturing(self) -> bool:
        """Whether operations are not run now, but recorded in a graph."""
        ...


class DeviceStreams:
    """The streams of a real device, through torch's module for it.

    Args:
        device: of any type that has streams, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._captures = getattr(self._module, "is_current_stream_capturing", None)

    def make(self) -> Any:
        # A lower number goes first; what a device does not have counts as the next that it has.
        return self._module.Stream(device=self._device, priority=-1)

    def current(self) -> Any:
        return self._module.current_stream(self._device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return self._module.stream(stream)

    def record(self, stream: Any, *, timed: bool = False) -> Any:
        event = self._module.Event(enable_timing=timed)
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def seconds(self, first: Any, last: Any) -> float:
        first.synchronize()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def keep(self, tensor: Tensor, stream: Any) -> None:
        if tensor.device.type == self._device.type:
            tensor.record_stream(stream)

    def capturing(self) -> bool:
        return self._captures is not None and self._captures()
