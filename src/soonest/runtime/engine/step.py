"""What the user's ``optimizer.step()`` does: it notes the settings of that moment, and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from soonest.errors import SoonestError
from soonest.runtime.engine.model_changes import follow, regroup, take_in
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.guard import modes, pending
from soonest.runtime.optim.bucket_update import raw_step

if TYPE_CHECKING:
    from soonest.runtime.engine.engine import Engine


def step(engine: Engine, closure: Callable[[], Any] | None) -> Any:
    """What the user's ``optimizer.step(closure)`` does."""
    if modes.is_compiling() and engine.updater.owned:
        raise engine.failures.at_fault(
            ValueError(
                "optimizer.step() is called from code that torch.compile compiles, and soonest "
                "would round updates otherwise than that: call it outside, and leave out "
                "torch.compile(optimizer.step)"
            )
        )
    engine.lane.check()
    engine.backward.check()
    if engine.updater.outdated():
        regroup(engine)
    follow(engine)
    blocking = engine.bound_plan.plan.blocking
    others = engine.updater.trains_others()
    if others and engine.newcomers is not None and (come := engine.newcomers.come()):
        take_in(engine, come)  # the backward pass was none of the model's parameters so far
        others = engine.updater.trains_others()
    if others and engine.state.parts is not None:
        raise engine.failures.at_fault(
            SoonestError(
                "the optimizer has a gradient of a parameter that is frozen or no longer in "
                "the model, and under shard_optimizer=True that is nobody's to update: set its "
                "grad to None, or take it out of the optimizer"
            )
        )
    whole = engine.state.parts is None and (blocking or engine.layout.overlaps or others)
    if engine.separable and not whole:
        loss = _by_bucket(engine, closure)
        if blocking:
            engine.flush()
            engine.in_flight.watch()
    else:
        loss = _at_once(engine, closure)
    latest = engine.backward.latest
    reduced = latest is not None and engine.profiler.record is latest.record
    if reduced and engine.backward.everyone:
        engine.after_step(engine)
    return loss


def _at_once(engine: Engine, closure: Callable[[], Any] | None) -> Any:
    engine.flush()
    try:
        loss = raw_step(engine.cls)(engine.optimizer, *(() if closure is None else (closure,)))
    except Exception as error:
        if not isinstance(error, SoonestError):
            engine.failures.tell(f"optimizer.step() raised {error!r}")
        raise
    if engine.backward.latest is not None:
        engine.profiler.record = engine.backward.latest.record
    engine.in_flight.watch()
    return loss


def _by_bucket(engine: Engine, closure: Callable[[], Any] | None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    pass_state = engine.backward.latest
    if pass_state is None or pass_state.step is not None:  # no backward pass was reduced since
        record = engine.profiler.new_record()
        before, pass_state = (
            pass_state,
            PassState(engine.backward.passes, engine.bound_plan, record, local=True),
        )
        if before is not None:
            pass_state.unused |= before.unused
            pass_state.users = before.users
        engine.lane.begin(pass_state)
    scaled = engine.optimizer.__dict__.get("grad_scale") is not None
    gradients = engine.gradients.of(
        engine.updater.owned, engine.in_flight.unknown, engine.in_flight.copies, scaled=scaled
    )
    call = engine.updater.call(gradients)
    aliased = engine.aliases.of(engine.layout.params[order] for order in gradients)
    state_is_kept = engine.state.is_kept(names=engine.updater.seen_state is not None)
    engine.in_flight.expect(pass_state, gradients)
    engine.profiler.record = pass_state.record
    pass_state.step = call
    if scaled and pass_state.plan.sharded:  # each rank divides its parts, where it updates them
        pass_state.whole = False
    engine.lane.advance()
    for param in aliased:
        pending.wait_for(param.parameter)
    if state_is_kept:
        engine.flush()
    return loss
