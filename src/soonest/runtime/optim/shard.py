"""Shards: the parts of parameters of which each rank updates only its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soonest.core.plan import Plan, borders
from soonest.runtime.comm import Wire
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.param import FlatParam

Key = tuple[str, int, int]
"""A shard as a key: the parameter's name, its first element in memory, and the one behind it."""


@dataclass(eq=False, slots=True, repr=False)
class ParamShard:
    """This rank's part of one parameter: consecutive elements, in the order of memory.

    Args:
        param: the parameter.
        start, stop: the first of its elements, and the one behind the last.
        raw_grad: that part of its gradient, one-dimensional.
        alias: that part of the parameter, one-dimensional, which the optimizer updates.
        shown: what the model has of it, if that is rounded to ``narrow``; then ``alias`` is exact,
            and has memory of its own.
        narrow: the dtype in which it is sent, if that is narrower than its own.
    """

    param: FlatParam
    start: int
    stop: int
    raw_grad: Tensor
    alias: nn.Parameter
    shown: Tensor | None = None
    narrow: torch.dtype | None = None

    def __repr__(self) -> str:
        return f"ParamShard({self.param.name}[{self.start}:{self.stop}])"

    @property
    def key(self) -> Key:
        return (self.param.name, self.start, self.stop)

    def part_of(self, whole: Tensor) -> Tensor:
        """The same part of a tensor of the parameter's shape; a view only if strides are alike."""
        return in_memory(whole, self.param.raw_grad)[self.start : self.stop]

    def follow(self) -> None:
        """Goes along with the parameter, which has other memory now."""
        here = part_of(self.param, self.start, self.stop)
        if self.shown is None:
            self.alias.data = here
        else:
            self.shown = here

    def recall(self) -> None:
        """Makes ``alias`` the present value, also where the user has written to the model since."""
        if self.shown is not None:
            known = self.alias.detach()
            torch.where(known.to(self.narrow) == self.shown, known, self.shown, out=known)

    def show(self) -> None:
        """Writes ``alias`` to the model, rounded as the other ranks will get it."""
        if self.shown is not None:
            self.shown.copy_(self.alias.detach().to(self.narrow))


def shards_of(plan: Plan, layout: FlatBuffers, rank: int, wire: Wire) -> list[list[ParamShard]]:
    """Makes the shards of parameters that a rank updates, per bucket."""
    found: list[list[ParamShard]] = []
    by_slot = {(param.flat, param.slot.start): param for param in layout.params}
    for index, bucket in enumerate(plan.buckets):
        shards: list[ParamShard] = []
        grads = layout.grads[bucket.flat]
        narrow = wire.of(grads.element_size()).parameters
        for start, stop, slot in _overlaps(plan, index, rank):
            param = by_slot[bucket.flat, slot]
            shown = part_of(param, start - slot, stop - slot)
            alias = nn.Parameter(shown.clone() if narrow else shown)
            for name, value in vars(param.parameter).items():
                setattr(alias, name, value)
            param.extra += 1
            part = (start - slot, stop - slot, grads[start:stop], alias)
            shards.append(ParamShard(param, *part, shown if narrow else None, narrow))
        found.append(shards)
    return found


def firsts_of(plan: Plan, index: int) -> list[tuple[int, int]]:
    """The first element of each part of each parameter in a bucket, and where its slot starts.

    A rank without a gradient of the parameter writes -0.0 there, and all others make their zeros
    positive. A sum is -0.0 only if all that is added is, so the owner of a part sees in its own sum
    whether any rank had a gradient; the count behind the gradient may be in another rank's part.
    """
    return [
        (start, slot)
        for rank in range(plan.ranks)
        for start, _, slot in _overlaps(plan, index, rank)
    ]


def _overlaps(plan: Plan, index: int, rank: int) -> Iterator[tuple[int, int, int]]:
    """Iterates over the places where a rank's part of a bucket meets a slot.

    Returns:
        First element and the one behind the last in the flat buffer, and where the slot starts.
    """
    bucket = plan.buckets[index]
    flat = plan.flats[bucket.flat]
    at = borders(bucket.stop - bucket.start, plan.ranks, flat.itemsize)
    first, last = bucket.start + at[rank], bucket.start + at[rank + 1]
    for slot in (flat.slots[number] for number in plan.slots_of[index]):
        start, stop = max(first, slot.start), min(last, slot.start + slot.numel)
        if start < stop:
            yield start, stop, slot.start
        elif not slot.numel and not rank:  # one rank has its whole state, no matter which
            yield slot.start, slot.start, slot.start


def part_of(param: FlatParam, start: int, stop: int) -> Tensor:
    """Consecutive elements of a parameter, in the memory that it has now."""
    return in_memory(param.alias.detach(), param.raw_grad)[start:stop]


def in_memory(whole: Tensor, like: Tensor) -> Tensor:
    """The elements of a tensor in the order in which a parameter has them in memory."""
    if whole.stride() != like.stride():
        whole = torch.empty_like(like, dtype=whole.dtype, requires_grad=False).copy_(whole)
    return whole.as_strided((whole.numel(),), (1,))
