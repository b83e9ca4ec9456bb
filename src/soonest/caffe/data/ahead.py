"""Reads ahead: the next batches are made while the net computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Takes items in a thread of its own, in their order, before they are asked for.

    Args:
        items: without end.
        most: how many to have ready.
    """

    def __init__(self, items: Iterator[T], most: int) -> None:
        self._items = items
        self._most = most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="caffe data")
        self._coming: deque[Future[T]] = deque()

    def __next__(self) -> T:
        """The next item; raises what taking it raised."""
        while len(self._coming) <= self._most:
            self._coming.append(self._thread.submit(next, self._items))
        return self._coming.popleft().result()

    def close(self) -> None:
        """Drops what is not begun; else the process would make it all before it ends."""
        self._thread.shutdown(wait=False, cancel_futures=True)
