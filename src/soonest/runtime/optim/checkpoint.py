"""Model and optimizer in the form that ``torch.distributed.checkpoint`` saves and loads.

That form names everything by the parameter's name, so a checkpoint fits any number of ranks, with
soonest, with ``DistributedDataParallel`` or with neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.errors import SoonestError
from soonest.runtime.comm.error_text import said

_ADVICE = "load what handle.state_dict() or get_state_dict() gave"


def form_of(
    model: nn.Module, optimizer: Optimizer, exact: Mapping[nn.Parameter, Tensor]
) -> dict[str, Any]:
    """Makes what to save.

    Args:
        model: whose parameters have their values.
        optimizer: an ordinary one, with all of its state.
        exact: values of parameters which the model itself has but rounded.

    Returns:
        ``{"model": ..., "optim": ...}``, as ``get_state_dict`` makes them.
    """
    # Here, for it takes a second, and few need it.
    from torch.distributed.checkpoint.state_dict import get_state_dict

    of_model, of_optimizer = get_state_dict(model, optimizer)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in exact and name in of_model:
            of_model[name] = exact[parameter]
    return {"model": of_model, "optim": of_optimizer}


def check(model: nn.Module, form: Mapping[str, Any]) -> None:
    """Raises ValueError if ``take`` could not put this into a model, before anything is changed."""
    if not isinstance(form, Mapping):
        raise ValueError(f"the state is a {type(form).__name__}, but must be a dict: {_ADVICE}")
    for part in ("model", "optim"):
        if part not in form:
            raise ValueError(
                f"the state has no {part!r} (only {', '.join(map(repr, form)) or 'nothing'}): "
                f"{_ADVICE}"
            )
        if not isinstance(form[part], Mapping):
            what = type(form[part]).__name__
            raise ValueError(f"{part!r} in the state is a {what}, but must be a dict: {_ADVICE}")
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    mine, given = get_model_state_dict(model), form["model"]
    for name, value in mine.items():
        if name not in given:
            raise ValueError(f"the state has no {name!r}, which the model has: load one of it")
        theirs = given[name]
        if isinstance(value, Tensor) and not isinstance(theirs, Tensor):
            what = type(theirs).__name__
            raise ValueError(f"{name!r} in the state is a {what}, but must be a tensor: {_ADVICE}")
        if isinstance(value, Tensor) and isinstance(theirs, Tensor) and value.shape != theirs.shape:
            raise ValueError(
                f"{name!r} is {tuple(theirs.shape)} in the state, but {tuple(value.shape)} in the "
                "model: load a state of this model"
            )
    for name in given:
        if name not in mine:
            raise ValueError(f"the state has {name!r}, which the model has not: load one of it")


def take(model: nn.Module, optimizer: Optimizer, form: dict[str, Any]) -> None:
    """Puts into a model and an ordinary optimizer what ``form_of`` made, and ``check`` has seen.

    Raises:
        ValueError: it does not fit the optimizer; then the model is as it was.
    """
    from torch.distributed.checkpoint.state_dict import (
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    try:
        set_optimizer_state_dict(model, optimizer, form["optim"])
        set_model_state_dict(model, form["model"])
    except SoonestError:
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"the state cannot be loaded ({said(error)}): {_ADVICE}") from error
