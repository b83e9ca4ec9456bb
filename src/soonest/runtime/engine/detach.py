"""How training by priority ends: model and optimizer are plain objects again, in any case."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from soonest.errors import PeerLostError, SoonestError
from soonest.runtime.engine.partial_grads import complete_all
from soonest.runtime.execute.bound_plan import BoundPlan
from soonest.runtime.execute.pass_state import UPDATED, PassState
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.optim import patch

if TYPE_CHECKING:
    from soonest.runtime.engine.engine import Engine

_log = logging.getLogger(__name__)
_NAMED = 3


def detach(engine: Engine) -> None:
    """Leaves the model and the optimizer as they would be without soonest, in any case.

    Raises:
        SoonestError: a rank was lost or an update failed, and nobody has been told so yet; the
            message says what is missing.
    """
    known, found = engine.lane.error, None
    try:
        if known is None:
            engine.flush()
            if engine.state.parts is not None:
                complete_all(engine.in_flight)
            engine.state.hand_back()
    except SoonestError as error:
        found = error
        if isinstance(error, PeerLostError):
            engine.lane.fail(error)
    finally:
        missing = _missing(engine) if known or found else ""
        _let_go(engine)
    if found is not None:
        raise type(found)(f"{found}{missing and f'. {missing}'}") from found
    if missing:
        _log.warning("detach() after a failure: %s", missing)


def _missing(engine: Engine) -> str:
    """What is not as it would be had nothing failed, in words."""
    missing = undone(engine.bound_plan)
    if engine.state.parts is not None:
        missing += "; " * bool(missing) + (
            "the optimizer's state is sharded over the ranks, and this one has only its "
            "part: handle.local_optimizer_state() gives it"
        )
    return missing


def _let_go(engine: Engine) -> None:
    engine.lane.close()  # so that nothing is written any more
    engine.backward.detach()
    for hook in (*engine.model_hooks, engine.module_hooks, engine.entries):
        hook.remove()
    if engine.buffers is not None:
        engine.buffers.drop()
    engine.in_flight.drop()
    patch.hand_back(engine.optimizer)
    engine.layout.move_out()


def undone(bound_plan: BoundPlan) -> str:
    """Which parameters lack what of a step, in words; nothing if none do."""
    stepped = [pass_state for pass_state in bound_plan.unfinished if pass_state.step is not None]
    parts: list[str] = []
    for pass_state in sorted(stepped, key=lambda pass_state: pass_state.number):
        torn = [
            param
            for param in _owned(bound_plan, pass_state)
            if _is_torn(bound_plan, pass_state, param)
        ]
        stale = [
            param
            for param in _owned(bound_plan, pass_state)
            if _is_stale(bound_plan, pass_state, param)
        ]
        if torn:
            parts.append(
                f"{_names(torn)} in part {_have(torn)} the values of step {pass_state.number}"
            )
        if stale:
            parts.append(f"{_names(stale)} {_lack(stale)} the update of step {pass_state.number}")
    return " and ".join(parts)


def _owned(bound_plan: BoundPlan, pass_state: PassState) -> Iterator[FlatParam]:
    return (m for m in bound_plan.layout.params if m.order in pass_state.step.gradients)


def _touched(pass_state: PassState, bucket: int) -> bool:
    return pass_state.states[bucket] >= UPDATED


def _is_torn(bound_plan: BoundPlan, pass_state: PassState, param: FlatParam) -> bool:
    """Whether elements of it are of this step, and others of the one before."""
    if not pass_state.plan.sharded:  # then it is updated as a whole
        return False
    buckets = bound_plan.buckets_of[param.order]
    whole = all(pass_state.states[bucket] >= pass_state.final for bucket in buckets)
    return not whole and any(_touched(pass_state, bucket) for bucket in buckets)


def _is_stale(bound_plan: BoundPlan, pass_state: PassState, param: FlatParam) -> bool:
    """Whether it is as the step before has left it."""
    if not pass_state.plan.sharded:
        return not _touched(pass_state, bound_plan.last_of[param.order])
    return not any(_touched(pass_state, bucket) for bucket in bound_plan.buckets_of[param.order])


def _names(params: Sequence[FlatParam]) -> str:
    names = ", ".join(repr(param.name) for param in params[:_NAMED])
    more = len(params) - _NAMED
    return names + (f" and {more} more" if more > 0 else "")


def _have(params: Sequence[FlatParam]) -> str:
    return "has" if len(params) == 1 else "have"


def _lack(params: Sequence[FlatParam]) -> str:
    return "lacks" if len(params) == 1 else "lack"
