"""Which parameters the ranks have used in a pass: it travels with the gradients, in their buffers.

``parameter.grad`` has to stay None, and the optimizer to leave a parameter alone, where no rank has
used it. One rank alone cannot know that, and a message of its own would cost a round trip per step.
So the element behind each gradient counts the ranks that have it: summed with the gradient, by the
same op.

Where the optimizer is sharded, the rank that updates a part has to know, too, and the count may lie
in another rank's part. There the first element of each part says it: a sum is negative zero only if
all that is added is, and so a rank that has no gradient begins with negative zero.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from soonest.core.plan import Plan
from soonest.runtime import comm
from soonest.runtime.comm import Group
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.optim.shard import firsts_of
from soonest.runtime.optim.sharded_state import ShardedState

if TYPE_CHECKING:
    from soonest.runtime.execute.pass_state import PassState

_KEPT = 2.0**-12
"""Counts a rank that has only an earlier gradient: more than none, and less than any that used it,
however many there are."""
_USED = 0.5
"""From this count on, a rank's pass has used the parameter."""


class UsageCounts:
    """Writes and reads how many ranks have used each parameter.

    Args:
        plan: whose buckets carry the counts.
        layout: the buffers.
        group: of all ranks.
        state: of this rank's parts, if the plan shards.
    """

    def __init__(
        self, plan: Plan, layout: FlatBuffers, group: Group, state: ShardedState | None
    ) -> None:
        self._layout = layout
        self._group = group
        self._state = state
        self._counts: list[_Places] = []
        self._firsts: list[_Places] = []
        at = {(param.flat, param.slot.start): param.order for param in layout.params}
        for index, bucket in enumerate(plan.buckets):
            slots = [plan.flats[bucket.flat].slots[slot] for slot in plan.slots_of[index]]
            counts = [(slot.count_at, slot.start) for slot in slots]
            counts = [
                (place, slot) for place, slot in counts if bucket.start <= place < bucket.stop
            ]
            firsts = firsts_of(plan, index) if plan.sharded else []
            device = layout.grads[bucket.flat].device
            for found, places in ((counts, self._counts), (firsts, self._firsts)):
                offsets = [place - bucket.start for place, _ in found]
                orders = [at[bucket.flat, slot] for _, slot in found]
                places.append(_Places(_offsets(offsets, device), orders, offsets))

    def memory(self) -> list[Tensor]:
        """All tensors that writing uses."""
        return [places.on_device for places in (*self._counts, *self._firsts)]

    def write(self, pass_state: PassState, bucket: int, gradients: Tensor) -> None:
        """Puts into a bucket which of its gradients this rank has.

        Args:
            pass_state: knows it.
            bucket: of the plan.
            gradients: that bucket's.
        """
        self._write_counts(pass_state, self._counts[bucket], gradients)
        if pass_state.plan.sharded:
            self._write_signs(pass_state, self._firsts[bucket], gradients)

    def _write_counts(self, pass_state: PassState, places: _Places, gradients: Tensor) -> None:
        if places.params:
            gradients.index_fill_(0, places.on_device, 1.0)
            for which, count in ((pass_state.unused, 0.0), (pass_state.kept.keys(), _KEPT)):
                if not which.isdisjoint(places.params):
                    _fill(gradients, places, which, count)

    def _write_signs(self, pass_state: PassState, places: _Places, gradients: Tensor) -> None:
        gradients[places.on_device] += 0.0  # makes positive what happens to be negative zero
        if not pass_state.unused.isdisjoint(places.params):
            _fill(gradients, places, pass_state.unused, -0.0)

    def write_sums(self, pass_state: PassState, *, ranks_differ: bool) -> None:
        """Puts the sums over all ranks behind the gradients, where these do not carry the counts.

        Args:
            pass_state: whose gradients.
            ranks_differ: ranks tell each other, in a collective call; otherwise all have the same.
        """
        params = self._layout.params
        here = [
            _KEPT if m.order in pass_state.kept else float(m.order not in pass_state.unused)
            for m in params
        ]
        counts = torch.tensor(here, device=self._layout.grads[0].device)
        if ranks_differ:
            comm.sum_small(self._group, counts)
        else:
            counts *= self._group.size()
        for param, count in zip(params, counts.tolist(), strict=True):
            self._layout.grads[param.flat][param.slot.count_at] = count

    # Once the gradients are reduced

    def users_of(self, param: FlatParam) -> int:
        """How many ranks have used this parameter in their backward passes."""
        return round(float(self._count_of(param)))

    def is_used(self, param: FlatParam) -> Tensor:
        """Whether any rank has, as a tensor, so that the host need not wait for a device."""
        return self._count_of(param) > _USED

    def used_anywhere(self, param: FlatParam) -> bool:
        """Whether any rank's pass gave this parameter a gradient; also where ranks have parts."""
        pass_state = param.pass_state
        if self._state is not None and pass_state is not None and not pass_state.whole:
            return self._state.has_users(pass_state, param)
        return bool(self.is_used(param))

    def _count_of(self, param: FlatParam) -> Tensor:
        return self._layout.grads[param.flat][param.slot.count_at]


def is_used_part(gradient: Tensor) -> bool:
    """Whether any rank has a gradient, seen from a part of it that is reduced and not empty."""
    first = gradient[:1]
    return not bool(((first == 0) & torch.signbit(first)).any())


class _Places(NamedTuple):
    """Elements of a bucket, each of which says something about a parameter.

    Args:
        on_device: their offsets, to be filled all at once.
        params: the order of the parameter of each.
        offsets: the same as ``on_device``, on the host.
    """

    on_device: Tensor
    params: list[int]
    offsets: list[int]


def _offsets(offsets: list[int], device: torch.device) -> Tensor:
    return torch.tensor(offsets, dtype=torch.long, device=device)


def _fill(gradients: Tensor, places: _Places, which: Collection[int], value: float) -> None:
    """Writes to the places of some parameters, one by one.

    A device would have to be asked for a choice of offsets.
    """
    for param, place in zip(places.params, places.offsets, strict=True):
        if param in which:
            gradients[place].fill_(value)
