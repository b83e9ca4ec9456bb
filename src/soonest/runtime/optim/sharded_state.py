"""The optimizer's state, sharded: each rank has the states of its shards of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from soonest.core.plan import Plan
from soonest.errors import SoonestError
from soonest.runtime import comm
from soonest.runtime.comm import EXACT, Ranks, Wire
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.comm.groups import private_group
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.optim.shard import Key, ParamShard, in_memory, shards_of
from soonest.runtime.optim.state_entries import copy_of, is_per_element
from soonest.runtime.optim.state_gather import StateGather, Take
from soonest.runtime.optim.usage import Users

if TYPE_CHECKING:
    from soonest.runtime.execute.pass_state import PassState

_ADVICE = "; under shard_optimizer=True every rank must do so, at the same point"
_GATHERING = "gathering the optimizer's state"
_CALLS = ("reading gradients", "clipping gradients", _GATHERING)
"""The collective calls of the user's; ranks tell each other which one they make."""
_COUNTING = "finding out which parameters the ranks have used"
_VALUE = "value"
"""The name under which exact values of a shard move along with the optimizer's state."""


class ShardedState:
    """The optimizer's states of this rank's shards.

    Args:
        ranks: over which the state is sharded, with communicators that nothing else uses.
        plan, layout: of the shards.
        failures: who the ranks are.
        wire: where parameters are sent rounded, this rank keeps the exact values of its shards,
            and the model has rounded ones from now on, on every rank.

    Attributes:
        parts: state dicts by shard; the optimizer fills them, as any.
        shards: per bucket, this rank's shards.
    """

    def __init__(
        self,
        ranks: Ranks,
        plan: Plan,
        layout: FlatBuffers,
        failures: FailureReporter,
        wire: Wire = EXACT,
    ) -> None:
        self.ranks = ranks
        self._failures = failures
        self._users_group = ranks.group if ranks.native else private_group(ranks.group)
        self.parts: dict[Key, dict[str, Any]] = {}
        self._wire = wire
        self._bind(plan, layout, self._new_shards(plan, layout))
        self._round()

    def __repr__(self) -> str:
        rank, ranks = self.ranks.group.rank(), self.ranks.group.size()
        many = sum(map(len, self.shards))
        return f"ShardedState(rank {rank} of {ranks}, {many} shards, {len(self.parts)} with state)"

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Says what a collective call of the user's needs if other ranks do not make it.

        Args:
            what: one of ``_CALLS``.

        Raises:
            PeerLostError: they did not.
            SoonestError: they do something else, which would break what they send each other.
        """
        with self._failures.together(what, _ADVICE):
            if not self.ranks.native:  # the host of a device would have to wait for the answer
                self._agree_on(what)
            yield

    def _agree_on(self, what: str) -> None:
        group = self.ranks.group
        every = [int(n) for n in comm.gather_numbers(group, _CALLS.index(what))]
        if len(set(every)) > 1:
            found = ", ".join(f"{_CALLS[n]} on rank {rank}" for rank, n in enumerate(every))
            raise self._failures.at_fault(
                SoonestError(f"ranks do different things: {found}{_ADVICE}")
            )

    def count_users(self, pass_state: PassState) -> None:
        """Sends all ranks which parameters this one has used in a backward pass; collective."""
        used = torch.ones(len(self._layout.params))
        used[list(pass_state.unused)] = 0.0
        with self._failures.together(_COUNTING):
            pass_state.users = Users(self._users_group, used)

    def has_users(self, pass_state: PassState, param: FlatParam) -> bool:
        """Whether any rank has a gradient of this parameter."""
        assert pass_state.users is not None
        with self._failures.together(_COUNTING):
            return pass_state.users.has(param.order)

    def _new_shards(self, plan: Plan, layout: FlatBuffers) -> list[list[ParamShard]]:
        for param in layout.params:
            param.extra = 0
        return shards_of(plan, layout, self.ranks.group.rank(), self._wire)

    def _bind(self, plan: Plan, layout: FlatBuffers, shards: list[list[ParamShard]]) -> None:
        self._plan, self._layout, self.shards = plan, layout, shards

    def _gather(
        self, states: Mapping[Key, Mapping[str, Any]], take: Take
    ) -> dict[str, dict[str, Any]]:
        # Made anew each time: kept, it would lead back to this object, and what both refer to would
        # live until the next garbage collection, as if it were the user's.
        together = partial(self.together, _GATHERING)
        every = StateGather(self.ranks, self._plan, self._layout, self.shards, together)
        return every.gather(states, take)

    def _round(self) -> None:
        """Rounds the model's parameters to what is sent of them, if that is narrower."""
        for param in self._layout.params:
            narrow = self._wire.of(param.alias.element_size()).parameters
            if narrow:
                values = param.alias.detach()
                values.copy_(values.to(narrow))

    def follow(self, moved: Sequence[FlatParam]) -> None:
        """Lets updates go to the memory that these parameters have by now.

        Raises:
            SoonestError: one is laid out differently there.
        """
        for param in moved:
            if param.alias.stride() != param.raw_grad.stride():
                raise SoonestError(
                    f"parameter {param.name!r} is laid out differently in memory than when "
                    "prioritize was called, so its parts are no longer those of the optimizer's "
                    "state (shard_optimizer=True): give it its first memory format again, as by "
                    "model.to(memory_format=...), on every rank"
                )
        orders = {param.order for param in moved}
        for shard in self._all():
            if shard.param.order in orders:
                shard.follow()

    def _all(self) -> Iterator[ParamShard]:
        return (shard for shards in self.shards for shard in shards)

    def adopt(self, state: dict[Any, dict[str, Any]]) -> None:
        """Keeps this rank's shards of whole states, and drops those.

        Args:
            state: by parameter, as ``optimizer.state`` holds it.
        """
        for shard in self._all():
            whole = state.get(shard.param.parameter)
            if whole is not None:
                shape = shard.param.alias.shape
                self.parts[shard.key] = {
                    name: shard.part_of(value).clone()
                    if is_per_element(name, value, shape)
                    else copy_of(value)
                    for name, value in whole.items()
                }
        for param in self._layout.params:
            state.pop(param.parameter, None)

    def restart(self) -> None:
        """Takes the model's values as the exact ones, then rounds the model's."""
        for shard in self._all():
            if shard.shown is not None:
                shard.alias.detach().copy_(shard.shown)
        self._round()

    def move(self, plan: Plan, layout: FlatBuffers) -> None:
        """Shards the state anew for another plan; a collective call if the shards change."""
        coming = self._new_shards(plan, layout)
        states = {key: dict(state) for key, state in self.parts.items()}
        for key, exact in self._exact().items():
            states.setdefault(key, {})[_VALUE] = exact
        names = {id(param.parameter): param.name for param in layout.params}
        renamed = {m.name: names.get(id(m.parameter), "") for m in self._layout.params}
        same = all(before == now for before, now in renamed.items())
        if not same or (plan.flats, _borders(plan)) != (self._plan.flats, _borders(self._plan)):
            states = self._moved(states, coming, renamed)
        for shard in (shard for shards in coming for shard in shards):
            exact = states.get(shard.key, {}).pop(_VALUE, None)
            if exact is not None:
                shard.alias.detach().copy_(exact)
        self.parts = {key: state for key, state in states.items() if state}
        self._bind(plan, layout, coming)

    def _moved(
        self,
        states: dict[Key, dict[str, Any]],
        coming: list[list[ParamShard]],
        renamed: Mapping[str, str],
    ) -> dict[Key, dict[str, Any]]:
        """Turns the states of the present shards into those of the shards to come; collective.

        Args:
            states: of this rank's present shards.
            coming: per bucket, this rank's shards to come.
            renamed: parameters' names now, and to come.
        """
        by_name: dict[str, list[ParamShard]] = {}
        for shard in (shard for of_bucket in coming for shard in of_bucket):
            by_name.setdefault(shard.param.name, []).append(shard)
        parts: dict[Key, dict[str, Any]] = {}

        def take(name: str, key: str, start: int, piece: Tensor) -> None:
            for shard in by_name.get(renamed[name], ()):
                low, high = max(start, shard.start), min(start + piece.numel(), shard.stop)
                if low < high or shard.start == shard.stop:
                    values = parts.setdefault(shard.key, {})
                    if key not in values:
                        values[key] = piece.new_zeros(shard.stop - shard.start)
                    values[key][low - shard.start : high - shard.start] = piece[
                        low - start : high - start
                    ]

        for name, scalars in self._gather(states, take).items():
            for shard in by_name.get(renamed[name], ()):
                found = {key: copy_of(value) for key, value in scalars.items()}
                parts[shard.key] = {**found, **parts.get(shard.key, {})}
        return parts

    def _exact(self) -> dict[Key, Tensor]:
        """The exact values of this rank's shards of parameters that are sent rounded."""
        rounded = [shard for shard in self._all() if shard.shown is not None]
        for shard in rounded:
            shard.recall()
        return {shard.key: shard.alias.detach() for shard in rounded}

    def exact_parameters(self) -> dict[nn.Parameter, Tensor]:
        """The exact values of parameters that are sent rounded; collective if there are any."""
        if not self._wire.parameters:
            return {}
        params = {param.name: param.parameter for param in self._layout.params}
        states = {key: {_VALUE: exact} for key, exact in self._exact().items()}
        return {params[name]: values[_VALUE] for name, values in self._whole(states).items()}

    def whole(self) -> dict[str, dict[str, Any]]:
        """The optimizer's whole state, by name of the parameter; a collective call."""
        return self._whole(self.parts)

    def _whole(self, states: Mapping[Key, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        params = {param.name: param for param in self._layout.params}
        found: dict[str, dict[str, Any]] = {}

        def take(name: str, key: str, start: int, piece: Tensor) -> None:
            like = params[name].raw_grad
            values = found.setdefault(name, {})
            if key not in values:
                values[key] = torch.empty_like(like, dtype=piece.dtype)
            in_memory(values[key], like)[start : start + piece.numel()] = piece

        for name, scalars in self._gather(states, take).items():
            copies = {key: copy_of(value) for key, value in scalars.items()}
            found[name] = {**copies, **found.get(name, {})}
        return found


def _borders(plan: Plan) -> Sequence[tuple[int, int, int]]:
    """Where the plan's buckets begin and end, and so the shards in them."""
    return [(bucket.flat, bucket.start, bucket.stop) for bucket in plan.buckets]
