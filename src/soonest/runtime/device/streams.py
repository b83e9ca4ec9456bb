"""The few things that a lane needs of a device with streams."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

Stream = Hashable
"""A queue of a device: what is enqueued runs in order, and beside all other queues."""


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the device has got there.

        Raises:
            RuntimeError: something that the device was asked to do has failed.
        """
        ...


class Streams(Protocol):
    """The streams of one device. Nothing here lets the host wait, but ``seconds``."""

    def make(self) -> Stream:
        """A stream of high priority."""
        ...

    def current(self) -> Stream:
        """The one on which this thread's operations run now."""
        ...

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """Within this context, this thread's operations run on that stream."""
        ...

    def record(self, stream: Stream, *, timed: bool = False) -> Event:
        """The point that a stream has been filled up to.

        Args:
            stream: which one.
            timed: ``seconds`` is to be asked of it.
        """
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What is enqueued on a stream from now on runs after that point."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """How long the device took from one timed point to another; waits for both."""
        ...

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        """Memory of the tensor is not used again before the stream has got past what it has now."""
        ...

    def capturing(self) -> bool:
        """Whether operations are not run now, but recorded in a graph."""
        ...


class DeviceStreams:
    """Those of a real device, through torch's module for it.

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
