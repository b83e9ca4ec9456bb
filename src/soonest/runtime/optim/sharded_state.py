"""The optimizer state of parts of parameters: each rank has that of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from soonest.core.plan import GATHER_PARAMETERS, Plan
from soonest.errors import SoonestError
from soonest.runtime import comm
from soonest.runtime.comm import EXACT, Piece, Ranks, Wire
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.comm.groups import again
from soonest.runtime.flat.buffers import FlatBuffers, FlatParam
from soonest.runtime.optim.shard import Key, ParamShard, in_memory, shares_of
from soonest.runtime.optim.usage import Users

if TYPE_CHECKING:
    from soonest.runtime.execute.pass_state import PassState

_ADVICE = "; under shard_optimizer=True every rank must do so, at the same point"
_CALLS = ("reading gradients", "clipping gradients", "gathering the optimizer's state")
_COUNTING = "finding out which parameters the ranks have used"
_VALUE = "value"
"""The name of the exact values of a part, where they move along with the optimizer's state."""


class ShardedState:
    """The optimizer state of this rank's parts.

    Args:
        ranks: over which it is shared out; for nothing else, so that this is in nobody's way.
        plan, layout: of the parts.
        failures: who they are.
        wire: where parameters are sent rounded, this rank keeps the exact values of its parts,
            and the model has rounded ones from now on, on every rank.

    Attributes:
        parts: state dicts by part; created by the optimizer, as any.
        shares: per bucket, this rank's parts.
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
        self._users_group = ranks.group if ranks.native else again(ranks.group)
        self.parts: dict[Key, dict[str, Any]] = {}
        self._wire = wire
        self._bind(plan, layout, self._shares(plan, layout))
        self._round()

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Around a collective call of the user's: says what it needs if other ranks do not come.

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
        """Lets all ranks know who has used which parameters in a backward pass; collective."""
        used = torch.ones(len(self._layout.params))
        used[list(pass_state.unused)] = 0.0
        with self._failures.together(_COUNTING):
            pass_state.users = Users(self._users_group, used)

    def has_users(self, pass_state: PassState, param: FlatParam) -> bool:
        """Whether any rank has a gradient of this parameter."""
        assert pass_state.users is not None
        with self._failures.together(_COUNTING):
            return pass_state.users.has(param.order)

    def _shares(self, plan: Plan, layout: FlatBuffers) -> list[list[ParamShard]]:
        for param in layout.params:
            param.extra = 0
        return shares_of(plan, layout, self.ranks.group.rank(), self._wire)

    def _bind(self, plan: Plan, layout: FlatBuffers, shares: list[list[ParamShard]]) -> None:
        self._plan, self._layout, self.shares = plan, layout, shares

    def _round(self) -> None:
        for param in self._layout.params:
            narrow = self._wire.of(param.alias.element_size()).parameters
            if narrow:
                values = param.alias.detach()
                values.copy_(values.to(narrow))

    def follow(self, moved: Sequence[FlatParam]) -> None:
        """These parameters have other memory now.

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
        for share in self._all():
            if share.param.order in orders:
                share.follow()

    def _all(self) -> Iterator[ParamShard]:
        return (share for shares in self.shares for share in shares)

    def adopt(self, state: dict[Any, dict[str, Any]]) -> None:
        """Keeps this rank's parts of whole states, and takes those away.

        Args:
            state: by parameter, as ``optimizer.state`` holds it.
        """
        for share in self._all():
            whole = state.get(share.param.parameter)
            if whole is not None:
                shape = share.param.alias.shape
                self.parts[share.key] = {
                    name: share.cut(value).clone()
                    if _per_element(name, value, shape)
                    else _copy(value)
                    for name, value in whole.items()
                }
        for param in self._layout.params:
            state.pop(param.parameter, None)

    def restart(self) -> None:
        """Takes the values that the model has for exact ones, and rounds the model's."""
        for share in self._all():
            if share.shown is not None:
                share.alias.detach().copy_(share.shown)
        self._round()

    def move(self, plan: Plan, layout: FlatBuffers) -> None:
        """Shares the state out anew; a collective call if the parts change."""
        coming = self._shares(plan, layout)
        states = {key: dict(state) for key, state in self.parts.items()}
        for key, exact in self._exact().items():
            states.setdefault(key, {})[_VALUE] = exact
        names = {id(param.parameter): param.name for param in layout.params}
        renamed = {m.name: names.get(id(m.parameter), "") for m in self._layout.params}
        same = all(before == now for before, now in renamed.items())
        if not same or (plan.flats, _cuts(plan)) != (self._plan.flats, _cuts(self._plan)):
            states = self._moved(states, coming, renamed)
        for share in (share for shares in coming for share in shares):
            exact = states.get(share.key, {}).pop(_VALUE, None)
            if exact is not None:
                share.alias.detach().copy_(exact)
        self.parts = {key: state for key, state in states.items() if state}
        self._bind(plan, layout, coming)

    def _moved(
        self,
        states: dict[Key, dict[str, Any]],
        coming: list[list[ParamShard]],
        renamed: Mapping[str, str],
    ) -> dict[Key, dict[str, Any]]:
        """States of the parts that this rank has now, as states of those to come; collective.

        Args:
            states: of this rank's parts.
            coming: per bucket, this rank's parts.
            renamed: parameters' names now, and to come.
        """
        shares: dict[str, list[ParamShard]] = {}
        for share in (share for of_bucket in coming for share in of_bucket):
            shares.setdefault(share.param.name, []).append(share)
        parts: dict[Key, dict[str, Any]] = {}

        def take(name: str, key: str, start: int, piece: Tensor) -> None:
            for share in shares.get(renamed[name], ()):
                low, high = max(start, share.start), min(start + piece.numel(), share.stop)
                if low < high or share.start == share.stop:
                    values = parts.setdefault(share.key, {})
                    if key not in values:
                        values[key] = piece.new_zeros(share.stop - share.start)
                    values[key][low - share.start : high - share.start] = piece[
                        low - start : high - start
                    ]

        for name, scalars in self._gather(states, take).items():
            for share in shares.get(renamed[name], ()):
                found = {key: _copy(value) for key, value in scalars.items()}
                parts[share.key] = {**found, **parts.get(share.key, {})}
        return parts

    def _exact(self) -> dict[Key, Tensor]:
        """This rank's parts of parameters that are sent rounded."""
        rounded = [share for share in self._all() if share.shown is not None]
        for share in rounded:
            share.recall()
        return {share.key: share.alias.detach() for share in rounded}

    def exact_parameters(self) -> dict[nn.Parameter, Tensor]:
        """By parameter, what it is before rounding, if it is sent rounded; collective then."""
        if not self._wire.parameters:
            return {}
        params = {param.name: param.parameter for param in self._layout.params}
        states = {key: {_VALUE: exact} for key, exact in self._exact().items()}
        return {params[name]: values[_VALUE] for name, values in self._whole(states).items()}

    def whole(self) -> dict[str, dict[str, Any]]:
        """By name of the parameter, the state as the optimizer would have it alone; collective."""
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
            copies = {key: _copy(value) for key, value in scalars.items()}
            found[name] = {**copies, **found.get(name, {})}
        return found

    def clip(
        self, parts: Sequence[Tensor], max_norm: float, norm_type: float, error: bool
    ) -> Tensor:
        """Scales parts of gradients so that the norm of all ranks' together is as asked.

        Returns:
            The norm before, as ``torch.nn.utils.clip_grad_norm_`` finds it.
        """
        norms = [torch.linalg.vector_norm(part, norm_type, dtype=torch.float64) for part in parts]
        norms = norms or [self._layout.grads[0].new_zeros((), dtype=torch.float64)]
        mine = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        with self.together("clipping gradients"):
            every = comm.gather_scalars(self.ranks.group, mine)
        norm = torch.linalg.vector_norm(every, norm_type)
        dtype = parts[0].dtype if parts else torch.float32
        norm = norm.to(torch.promote_types(dtype, torch.float32))
        if error and not torch.isfinite(norm):
            raise RuntimeError(
                f"the norm of order {norm_type} of all gradients is {norm.item()}, so they cannot "
                "be clipped"
            )
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for part in parts:
            part.mul_(factor.to(part.dtype))
        return norm

    def _gather(
        self,
        states: Mapping[Key, Mapping[str, Any]],
        take: Callable[[str, str, int, Tensor], None],
    ) -> dict[str, dict[str, Any]]:
        """Shows every rank all states, one bucket and entry at a time.

        Args:
            states: of this rank's parts.
            take: called with parameter, entry, first element, and values from there on.

        Returns:
            By parameter, the entries that do not have a value per element.
        """
        mine: dict[str, tuple[dict[str, torch.dtype], dict[str, Any]]] = {}
        for share in self._all():
            if share.key in states:
                mine[share.param.name] = _described(states[share.key], share.alias.shape)
        described: dict[str, tuple[dict[str, torch.dtype], dict[str, Any]]] = {}
        with self.together("gathering the optimizer's state"):
            for theirs in comm.gather_objects(self.ranks.group, mine):
                described |= theirs
        for index, bucket in enumerate(self._plan.buckets):
            slots = self._plan.flats[bucket.flat].slots
            inside = [slots[i] for i in self._plan.slots_of[index] if slots[i].name in described]
            entries = {key: of for slot in inside for key, of in described[slot.name][0].items()}
            for key, dtype in sorted(entries.items()):
                values = self._entry(states, index, key, dtype)
                for slot in inside:
                    start = max(slot.start, bucket.start)
                    stop = min(slot.start + slot.numel, bucket.stop)
                    if (start < stop or not slot.numel) and key in described[slot.name][0]:
                        piece = values[start - bucket.start : stop - bucket.start]
                        take(slot.name, key, start - slot.start, piece)
        return {name: scalars for name, (_, scalars) in described.items()}

    def _entry(
        self, states: Mapping[Key, Mapping[str, Any]], index: int, key: str, dtype: torch.dtype
    ) -> Tensor:
        """One entry of the states of a whole bucket, from all ranks."""
        bucket = self._plan.buckets[index]
        values = torch.zeros(
            bucket.stop - bucket.start, dtype=dtype, device=self._layout.grads[bucket.flat].device
        )
        itemsize = self._plan.flats[bucket.flat].itemsize
        for share in self.shares[index]:
            known = states.get(share.key, {}).get(key)
            if known is not None:
                at = share.param.slot.start + share.start - bucket.start
                values[at : at + known.numel()] = known
        piece = Piece(values, values, itemsize=itemsize)
        with self.together("gathering the optimizer's state"):
            comm.run(GATHER_PARAMETERS, self.ranks, piece)
        return values


def _cuts(plan: Plan) -> Sequence[tuple[int, int, int]]:
    return [(bucket.flat, bucket.start, bucket.stop) for bucket in plan.buckets]


_OF_ALL_ELEMENTS = ("step", "eta", "mu", "mu_product")
"""What optimizers of ``torch.optim`` keep once for a parameter, as a tensor of no dimensions."""


def _per_element(name: str, value: Any, shape: torch.Size) -> bool:
    """Whether an entry of a state has a value for each element of a parameter of this shape."""
    if not isinstance(value, Tensor) or value.shape != shape:
        return False
    return value.dim() > 0 or name not in _OF_ALL_ELEMENTS


def _described(
    state: Mapping[str, Any], shape: torch.Size
) -> tuple[dict[str, torch.dtype], dict[str, Any]]:
    """Dtypes of what has a value per element, and the rest."""
    parts = {key: value.dtype for key, value in state.items() if _per_element(key, value, shape)}
    return parts, {key: value for key, value in state.items() if key not in parts}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
