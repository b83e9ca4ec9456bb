"""Finds who else synchronizes the gradients of a model: they would be averaged twice."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

_FSDP = ("FSDPModule", "FullyShardedDataParallel")
_LIBRARIES = {"horovod", "byteps", "bagua", "deepspeed", "hivemind"}
_TWICE = "which synchronizes gradients itself, so they would be averaged twice"
_INSTEAD = (
    "leave that out and call soonest.prioritize(model, optimizer) with the bare model, or put "
    "soonest.DistributedDataParallel(model) in its place"
)


def check_inside(model: nn.Module) -> None:
    """Raises ValueError if something else in this model synchronizes gradients of it."""
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if is_ours(module):
            if not module.has_given_way:
                raise ValueError(
                    f"{where} is a soonest.DistributedDataParallel, which synchronizes gradients "
                    "already: call its own prioritize(optimizer) instead"
                )
        elif (kind := _kind_of(module)) is not None:
            raise ValueError(f"{where} is wrapped by {kind}, {_TWICE}: {_INSTEAD}")


def check_outside(model: nn.Module) -> None:
    """Raises ValueError if something else around this model synchronizes gradients of it."""
    if next(_wrappers_of(model), None) is None:
        return
    gc.collect()  # one that nobody uses any more does no harm
    for wrapper in _wrappers_of(model):
        kind = type(wrapper).__name__
        if is_ours(wrapper):
            raise ValueError(
                "the model is in a soonest.DistributedDataParallel, which synchronizes gradients "
                "already: call the prioritize(optimizer) of that one instead"
            )
        raise ValueError(f"the model is wrapped by {kind} from outside, {_TWICE}: {_INSTEAD}")


def check_caller() -> None:
    """Raises ValueError if ``DistributedDataParallel`` runs the forward pass that begins now."""
    active = DistributedDataParallel._active_ddp_module
    if active is not None and not is_ours(active):
        kind = type(active).__name__
        raise ValueError(f"the model has been wrapped by {kind}, {_TWICE}: {_INSTEAD}")


def check_optimizer_of_others(optimizer: Optimizer) -> None:
    """Raises ValueError if the optimizer itself synchronizes gradients, as Horovod's does."""
    for cls in type(optimizer).__mro__:
        for member in (cls, *vars(cls).values()):
            library = str(getattr(member, "__module__", "")).split(".", 1)[0]
            if library in _LIBRARIES:
                raise ValueError(
                    f"the optimizer is wrapped by {library}, {_TWICE}: give prioritize the "
                    "optimizer without it"
                )


def is_ours(module: Any) -> bool:
    """Whether it is a ``soonest.DistributedDataParallel``."""
    return isinstance(module, DistributedDataParallel) and hasattr(module, "has_given_way")


def _kind_of(module: nn.Module) -> str | None:
    """The name of a module's kind, if it synchronizes gradients."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return type(module).__name__
    return "FSDP" if any(cls.__name__ in _FSDP for cls in type(module).__mro__) else None


def _wrappers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Looks among all objects for modules that synchronize gradients of this model from outside."""
    mine = {id(parameter) for parameter in model.parameters()}
    inside = {id(module) for module in model.modules()}
    kinds = set(_with_subclasses(DistributedDataParallel, DataParallel))
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        kinds |= set(_with_subclasses(fsdp.FullyShardedDataParallel))
    # Objects refer to their class; to look at each here takes twice as long.
    for found in [one for one in gc.get_referrers(*kinds) if type(one) in kinds]:
        if id(found) in inside or getattr(found, "has_given_way", False):
            continue
        if any(id(parameter) in mine for parameter in found.parameters()):
            yield found


def _with_subclasses(*classes: type) -> Iterator[type]:
    """Iterates over some classes and all that derive from them."""
    for cls in classes:
        yield cls
        yield from _with_subclasses(*cls.__subclasses__())
