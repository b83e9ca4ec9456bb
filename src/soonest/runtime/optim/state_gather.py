"""Shows every rank the states of all shards, one bucket and entry at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from soonest.core.plan import GATHER_PARAMETERS, Plan
from soonest.runtime import comm
from soonest.runtime.comm import Piece, Ranks
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.optim.shard import Key, ParamShard
from soonest.runtime.optim.state_entries import described

Take = Callable[[str, str, int, Tensor], None]
"""Called with parameter, entry, first element, and the entry's values from there on."""


class StateGather:
    """The shards of all ranks, whose states can be gathered.

    No rank needs memory for more than one entry of one bucket beside what ``Take`` keeps.

    Args:
        ranks: over which the state is sharded.
        plan, layout: of the shards.
        shards: per bucket, this rank's.
        together: a context for the collective calls.
    """

    def __init__(
        self,
        ranks: Ranks,
        plan: Plan,
        layout: FlatBuffers,
        shards: Sequence[Sequence[ParamShard]],
        together: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._ranks = ranks
        self._plan = plan
        self._layout = layout
        self._shards = shards
        self._together = together

    def gather(
        self, states: Mapping[Key, Mapping[str, Any]], take: Take
    ) -> dict[str, dict[str, Any]]:
        """Gathers states; a collective call.

        Args:
            states: of this rank's shards.
            take: gets the entries that have a value per element.

        Returns:
            By name of the parameter, the entries that do not.
        """
        mine: dict[str, tuple[dict[str, torch.dtype], dict[str, Any]]] = {}
        for shard in (shard for of_bucket in self._shards for shard in of_bucket):
            if shard.key in states:
                mine[shard.param.name] = described(states[shard.key], shard.alias.shape)
        every: dict[str, tuple[dict[str, torch.dtype], dict[str, Any]]] = {}
        with self._together():
            for theirs in comm.gather_objects(self._ranks.group, mine):
                every |= theirs
        for index, bucket in enumerate(self._plan.buckets):
            slots = self._plan.flats[bucket.flat].slots
            inside = [slots[i] for i in self._plan.slots_of[index] if slots[i].name in every]
            entries = {key: of for slot in inside for key, of in every[slot.name][0].items()}
            for key, dtype in sorted(entries.items()):
                values = self._entry(states, index, key, dtype)
                for slot in inside:
                    start = max(slot.start, bucket.start)
                    stop = min(slot.start + slot.numel, bucket.stop)
                    if (start < stop or not slot.numel) and key in every[slot.name][0]:
                        piece = values[start - bucket.start : stop - bucket.start]
                        take(slot.name, key, start - slot.start, piece)
        return {name: scalars for name, (_, scalars) in every.items()}

    def _entry(
        self, states: Mapping[Key, Mapping[str, Any]], index: int, key: str, dtype: torch.dtype
    ) -> Tensor:
        """One entry of the states of a whole bucket, from all ranks."""
        bucket = self._plan.buckets[index]
        values = torch.zeros(
            bucket.stop - bucket.start, dtype=dtype, device=self._layout.grads[bucket.flat].device
        )
        itemsize = self._plan.flats[bucket.flat].itemsize
        for shard in self._shards[index]:
            known = states.get(shard.key, {}).get(key)
            if known is not None:
                at = shard.param.slot.start + shard.start - bucket.start
                values[at : at + known.numel()] = known
        piece = Piece(values, values, itemsize=itemsize)
        with self._together():
            comm.run(GATHER_PARAMETERS, self._ranks, piece)
        return values
