"""A model or an optimizer that has become another one while it is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from soonest.errors import SoonestError
from soonest.runtime.guard import pending
from soonest.runtime.validate import checks, wrappers

if TYPE_CHECKING:
    from soonest.runtime.engine.engine import Engine

_log = logging.getLogger(__name__)


def follow(engine: Engine) -> None:
    """Parameters that the user has given other memory are updated there from now on."""
    with pending.DisableGuard():
        moved = [param for param in engine.layout.params if param.has_moved]
        if not moved:
            return
        try:
            _log.debug("new memory: %s", ", ".join(param.name for param in moved))
            engine.layout.follow(moved)
            if engine.state.parts is not None:
                if engine.layout.overlaps:
                    raise SoonestError(checks.OVERLAP)
                engine.state.parts.follow(moved)
        except SoonestError as error:
            raise engine.failures.at_fault(error) from None
    for param in moved:
        engine.backward.hooks.renew(param)


def renew_modules(engine: Engine) -> None:
    """The model has come to have other modules, or compiled ones."""
    engine.wait_for_all()
    engine.entries.renew()
    engine.module_hooks.move_to(engine.entries.outside())


def restructure(engine: Engine) -> None:
    """The model has other modules or parameters now; a collective call.

    What ``DistributedDataParallel`` would do if it were made anew: every rank gets the first
    one's new parameters, and its buffers.
    """
    _log.debug("the model has other modules or parameters than before")
    renew_modules(engine)
    engine.structure.look()
    if engine.newcomers is None:
        return
    try:
        wrappers.check_outside(engine.model)
        checks.check_model(engine.model, engine.layout.without)
    except ValueError as error:
        raise engine.failures.at_fault(error) from None
    engine.newcomers.look(engine.layout.params)
    present = {id(parameter) for parameter in engine.model.parameters()}
    come = engine.newcomers.come()
    if come or any(id(param.parameter) not in present for param in engine.layout.params):
        take_in(engine, come)
    if engine.buffers is not None:
        engine.buffers.anew()


def take_in(engine: Engine, parameters: Sequence[nn.Parameter]) -> None:
    """Trains these, too, from now on; a collective call."""
    assert engine.anew is not None
    _log.debug("%d more parameters are trained now", len(parameters))
    engine.complete()
    renew_modules(engine)
    engine.profiler.observing = True
    engine.anew(engine, parameters)
    engine.state.adopt()


def regroup(engine: Engine) -> None:
    """The optimizer has other parameters; a collective call if they have not been trained.

    Raises:
        ValueError: it has some that are not the model's.
    """
    _log.debug("the optimizer has other parameter groups than before")
    checks.check_optimizer(engine.model, engine.optimizer, engine.updater.param_ids)
    engine.flush()
    engine.updater.regroup()
    if engine.newcomers is not None:
        engine.newcomers.look(engine.layout.params)
        if parameters := engine.newcomers.come():
            take_in(engine, parameters)
