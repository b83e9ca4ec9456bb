"""Gradients of which this rank has only its part, as the optimizer's state is sharded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from soonest.errors import SoonestError
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.guard import pending

if TYPE_CHECKING:
    from soonest.runtime.engine.in_flight import InFlight


class PartialGrad(NamedTuple):
    """A gradient of which ranks may have only their parts.

    Args:
        param: whose.
        pass_state: has reduced it.
        held: this rank has only its part, which nobody may read.
        copy: the user's own tensor that is still to be given the whole, if it is not the buffer's.
    """

    param: FlatParam
    pass_state: PassState
    held: bool
    copy: Tensor | None


def is_partial(in_flight: InFlight, param: FlatParam) -> bool:
    """Whether this rank has only its part of the parameter's gradient."""
    held, pass_state = in_flight.held[param.order], param.pass_state
    if pass_state is None or pass_state.whole:
        return False
    if pass_state.step is not None and param.order in pass_state.step.zeroed:
        return False
    return held is not None and (held.tensor is param.grad or param.order in in_flight.copies)


def complete(in_flight: InFlight, param: FlatParam) -> None:
    """A gradient of which this rank has but a part is to be read."""
    pass_state = param.pass_state
    assert pass_state is not None
    if pass_state.step is not None:
        raise SoonestError(
            f"the gradient of {param.name!r} was read after optimizer.step(), but each rank "
            "has only its part of it, as shard_optimizer=True: read it before step(), on every "
            "rank, or clear gradients before the next backward pass"
        )
    for bucket in range(len(pass_state.plan.buckets)):
        in_flight.lane.wait(pass_state, bucket, updated=False)
    pass_state.bound_plan.gather_gradients(pass_state)
    in_flight.lane.spread()


def complete_kept(in_flight: InFlight) -> None:
    """Completes gradients that are still somebody's, before a backward pass overwrites others.

    It is a collective call if there are any.
    """
    for param in in_flight.params:
        if param.order in in_flight.unknown:
            pending.wait_for(param.parameter)
        with pending.DisableGuard():
            kept = param.parameter.grad is param.grad
        if (kept or param.order in in_flight.copies) and is_partial(in_flight, param):
            in_flight.wait_grad(param)


def complete_all(in_flight: InFlight) -> None:
    """Completes every gradient of which ranks have only their parts; a collective call.

    Nothing may be in flight.
    """
    parted = {
        m.pass_state
        for m in in_flight.params
        if m.pass_state is not None and not m.pass_state.whole
    }
    for pass_state in sorted(parted, key=lambda pass_state: pass_state.number):
        with pending.DisableGuard(), torch.no_grad():
            here = [m for m in in_flight.params if m.parameter.grad is m.grad]
            own = [(m, m.raw_grad.clone()) for m in here if not is_partial(in_flight, m)]
            pass_state.bound_plan.gather_gradients(pass_state)
            for param, gradient in own:  # others may have only their parts of these
                param.raw_grad.copy_(gradient)
    in_flight.lane.spread()


def hold_parts(in_flight: InFlight, parts: Sequence[PartialGrad]) -> None:
    """Holds what another one has given up."""
    here = {id(param.parameter): param for param in in_flight.params}
    for before, pass_state, held, copy in parts:
        param = here.get(id(before.parameter))
        if param is None:
            continue
        if copy is not None:
            in_flight.hold_copy(param, copy)
        elif held and param.grad is before.grad:
            in_flight.hold_gradient(param, param.grad)
        param.pass_state = pass_state
