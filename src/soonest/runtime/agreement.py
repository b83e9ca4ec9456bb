"""What the ranks make sure of together before anything depends on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from soonest.core.plan import Plan
from soonest.errors import PlanMismatchError
from soonest.runtime import comm
from soonest.runtime.comm.error_text import said
from soonest.runtime.flat.buffers import trainable


def agree_on_input(group: comm.Group, refused: Exception | None) -> None:
    """Makes sure that every rank can work with what it was given; a collective call.

    Args:
        group: all ranks.
        refused: what this rank cannot work with; None if it can.

    Raises:
        ValueError: on every rank, with the words of the first that cannot; on that one, and others
            that cannot, what it refused.
    """
    elsewhere = first_refusal(group, refused)
    if refused:
        raise refused
    if elsewhere:
        raise ValueError(elsewhere)


def first_refusal(group: comm.Group, refused: Exception | None) -> str | None:
    """What the first rank cannot work with that cannot, in words; a collective call."""
    every = comm.gather_objects(group, said(refused) if refused else None)
    return next((f"rank {rank}: {one}" for rank, one in enumerate(every) if one is not None), None)


def agree_on_model(group: comm.Group, model: nn.Module, without: Collection[str] = ()) -> None:
    """Compares the trainable parameters of all ranks' models; a collective call.

    Args:
        group: all ranks.
        model: this rank's.
        without: names of parameters that may differ.

    Raises:
        PlanMismatchError: on every rank, naming the first parameter that differs.
    """
    mine = [f"{name} {_described(p)}" for name, _, p in trainable(model, without)]
    models = comm.gather_objects(group, mine)
    for rank, theirs in enumerate(models):
        for index, (first, other) in enumerate(zip_longest(models[0], theirs, fillvalue="missing")):
            if first != other:
                raise PlanMismatchError(
                    f"the ranks have different models: parameter {index} is {first} on rank 0 and "
                    f"{other} on rank {rank}. Every rank must build the same model"
                )


def _described(parameter: nn.Parameter) -> str:
    """With the order of its elements in memory, which is that of its gradient in the buffers."""
    order = "" if parameter.is_contiguous() else f" in memory by {parameter.stride()}"
    return f"{tuple(parameter.shape)} {parameter.dtype}{order}"


def agree_on_the_rest(group: comm.Group, model: nn.Module, without: Collection[str] = ()) -> None:
    """Compares the frozen parameters and the buffers of all ranks' models; a collective call.

    Args:
        group: all ranks.
        model: this rank's.
        without: names of what may differ.

    Raises:
        PlanMismatchError: on every rank, naming the first that differs.
    """
    frozen = [(f"frozen parameter {n!r}", p) for n, p in model.named_parameters() if _rests(p)]
    buffers = [(f"buffer {name!r}", buffer) for name, buffer in model.named_buffers()]
    left_alone = {f"{kind} {name!r}" for name in without for kind in ("frozen parameter", "buffer")}
    mine = {
        name: f"{tuple(tensor.shape)} {tensor.dtype}"
        for name, tensor in (*frozen, *buffers)
        if name not in left_alone and not is_lazy(tensor)
    }
    if (difference := _difference(group, mine)) is not None:
        raise PlanMismatchError(
            f"the ranks have different models: {difference}. Every rank must build the same model"
        )


def _difference(group: comm.Group, mine: Mapping[str, str]) -> str | None:
    """What differs first between the ranks, and who has what, in words; a collective call."""
    every = comm.gather_objects(group, mine)
    for name in {name: None for theirs in every for name in theirs}:
        found = [theirs.get(name, "missing") for theirs in every]
        if len(set(found)) > 1:
            return f"{name} is {by_rank(found)}"
    return None


def _rests(parameter: nn.Parameter) -> bool:
    return not parameter.requires_grad


def agree_on_groups(
    group: comm.Group, model: nn.Module, optimizer: Optimizer, without: Collection[str] = ()
) -> None:
    """Compares the parameter groups of all ranks' optimizers; a collective call.

    Args:
        group: all ranks.
        model: this rank's.
        optimizer: this rank's.
        without: names of parameters that may differ.

    Raises:
        PlanMismatchError: on every rank, naming the first group and option that differ.
    """
    names = {id(parameter): name for name, _, parameter in trainable(model, without)}
    mine: dict[str, str] = {}
    for number, settings in enumerate(optimizer.param_groups):
        for option, value in settings.items():
            if option != "params" and (readable := _readable(value)) is not None:
                mine[f"{option} in group {number}"] = readable
        held = [names[id(p)] for p in settings["params"] if id(p) in names]
        mine[f"what is trained in group {number}"] = ", ".join(held) or "nothing"
    if (difference := _difference(group, mine)) is not None:
        raise PlanMismatchError(
            f"the ranks' optimizers differ: {difference}. Every rank must build the same "
            "optimizer, or load the same state into it before"
        )


def _readable(value: Any) -> str | None:
    """A setting in words, the same on every rank; None if it is nothing plain."""
    if isinstance(value, Tensor):
        return _readable(value.item()) if value.numel() == 1 else None
    if isinstance(value, bool | int | float | complex | str | torch.dtype) or value is None:
        return str(value)
    if isinstance(value, tuple | list):
        parts = [_readable(one) for one in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    return None


def by_rank(values: Sequence[str]) -> str:
    """Which ranks have which value, the most frequent first."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    ordered = sorted(ranks.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{value} on {_ranks(those)}" for value, those in ordered)


def _ranks(ranks: Sequence[int]) -> str:
    numbers = [str(rank) for rank in ranks]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"


def agree_on_options(group: comm.Group, options: Mapping[str, object]) -> None:
    """Compares what the ranks asked for; a collective call.

    Raises:
        PlanMismatchError: on every rank, naming the first option that differs.
    """
    mine = {name: str(value) for name, value in options.items()}
    every = comm.gather_objects(group, mine)
    for rank, theirs in enumerate(every):
        for name, value in every[0].items():
            if theirs[name] != value:
                raise PlanMismatchError(
                    f"the ranks ask for different things: {name} is {value} on rank 0 and "
                    f"{theirs[name]} on rank {rank}. Every rank must call prioritize alike"
                )


def agree_on_plan(group: comm.Group, plan: Plan) -> None:
    """Compares the plans of all ranks; a collective call.

    Raises:
        PlanMismatchError: on every rank, naming the first difference.
    """
    fingerprints = comm.gather_objects(group, plan.fingerprint)
    if len(set(fingerprints)) == 1:
        return
    plans = [Plan.from_json(p) for p in comm.gather_objects(group, plan.to_json())]
    rank, other = next((r, p) for r, p in enumerate(plans) if p.fingerprint != fingerprints[0])
    raise PlanMismatchError(
        f"the ranks have different plans; first difference between rank 0 and rank {rank}: "
        f"{plans[0].difference(other)}. Give every rank the same plan"
    )
