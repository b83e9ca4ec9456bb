"""A model's buffers at one moment, and on their way from one rank to all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from soonest.runtime import comm
from soonest.runtime.comm import Group, Sent
from soonest.runtime.validate.checks import check_buffer


class BufferSet:
    """The buffers of a model at one moment.

    Args:
        buffers: by name.
    """

    def __init__(self, buffers: dict[str, Tensor]) -> None:
        self.buffers = buffers
        self._known = [(name, id(buffer), buffer.shape) for name, buffer in buffers.items()]
        for name, buffer in buffers.items():
            check_buffer(name, buffer)
        self.described = [f"{n} {tuple(b.shape)} {b.dtype}" for n, b in buffers.items()]
        text = "\n".join(self.described).encode()
        self.signature = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())

    def consists_of(self, buffers: dict[str, Tensor]) -> bool:
        """Whether it is made of these very tensors, and they are as they were."""
        return len(buffers) == len(self._known) and all(
            (name, id(buffer), buffer.shape) == known
            for (name, buffer), known in zip(buffers.items(), self._known, strict=True)
        )

    def state(self) -> list[tuple[int, int]]:
        """Differs once one has been replaced or written to."""
        return [
            (id(b), 0 if b.is_inference() else b._version)  # pyright: ignore[reportAttributeAccessIssue]
            for b in self.buffers.values()
        ]

    def difference(self, before: BufferSet) -> str:
        """What there is here and was not before, and the other way round, in words."""
        new = [one for one in self.described if one not in before.described]
        gone = [one for one in before.described if one not in self.described]
        if not new and not gone:
            return "here they are as before"
        words = [("new here: ", new), ("no longer here: ", gone)]
        return "; ".join(what + ", ".join(some) for what, some in words if some)


class Broadcast:
    """Buffers on their way from one rank to all, behind a head of two numbers.

    The head says with what buffers and at what moment they were sent, so that a rank which has
    others, or is elsewhere, notices.

    Args:
        group: all ranks.
        source: the rank whose buffers they are.
        when: they are sent.
        now: this rank's.
        agreed: so many bytes follow, as all ranks know; None if nothing follows. Where this rank
            has others by now, their place is taken by zeros.
    """

    def __init__(
        self, group: Group, source: int, when: int, now: BufferSet, agreed: BufferSet | None
    ) -> None:
        self.now = now
        self.source = source
        self._head = torch.tensor([now.signature, when], dtype=torch.int64)
        (self._sent_head,) = comm.start_broadcast(group, [self._head], source)
        self.values: list[Sent] = []
        if agreed is not None:
            alike = agreed.signature == now.signature
            some = now.buffers if alike else agreed.buffers
            tensors = [b if alike else torch.zeros_like(b) for b in some.values()]
            self.values = comm.start_broadcast(group, tensors, source)

    def under_way(self) -> Sequence[Sent]:
        """What is to be waited for."""
        return (self._sent_head, *self.values)

    @property
    def signature(self) -> int:
        """Of the sender's buffers, once they have been waited for."""
        self._sent_head.unpack()
        return int(self._head[0])

    @property
    def when(self) -> int:
        self._sent_head.unpack()
        return int(self._head[1])
